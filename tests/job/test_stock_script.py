"""Scripts that know nothing of this package: with ``tiedlora run`` they take our schemes, and mistakes are one line."""

import json
import os
import subprocess
import sys
import urllib.request
from pathlib import Path

import forked
import pytest
import torch
import toy

from nemo_tiedlora.checkpoint.base import open_base
from nemo_tiedlora.checkpoint.merge import merge
from nemo_tiedlora.embedded.base import base as builtin_base

ROOT = Path(__file__).parents[2]
STOCK = Path(__file__).parent / "stock"
RUN = ("-m", "nemo_tiedlora", "run")
CPU = "trainer.accelerator=cpu"
TIED = ("model.peft.peft_scheme=tied_lora", "model.peft.tied_lora_tuning.rank=4", "model.peft.tied_lora_tuning.alpha=8")
#: Where NVIDIA's scripts are: a checkout of NeMo, or else its repository.
CHECKOUT = os.environ.get("NEMO_CHECKOUT")
REPOSITORY = "https://raw.githubusercontent.com/NVIDIA/NeMo/v2.2.0"
TUNING = "examples/nlp/language_modeling/tuning"


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    path = tmp_path_factory.mktemp("stock")
    toy.sums(path / "train.jsonl", 40)
    toy.sums(path / "validation.jsonl", 8, seed=1)
    return path


def job(*settings):
    """What the fine-tuning script is told."""
    files = [f"model.data.{split}_ds.file_names=[{split}.jsonl]" for split in ("train", "validation")]
    return [f"model.restore_from_path={builtin_base()}", *files, "model.optim.lr=0.01", *settings]


def run(folder, *arguments, code=0):
    """What a command that ends with this exit code says: on standard output, and on standard error."""
    ended, out, err = forked.script(*RUN, *arguments, cwd=folder)
    assert ended == code, err[-3000:]
    return out, err


@pytest.fixture(scope="module")
def adapter(folder):
    run(folder, STOCK / "finetuning.py", *job(CPU, *TIED))
    (path,) = folder.rglob("checkpoints/stock.nemo")
    return path


@pytest.mark.slow
def test_a_stock_script_trains_a_scheme_and_ours_read_its_adapter(folder, adapter):
    _, said, _ = forked.script("-m", "nemo_tiedlora", "inspect", adapter, "--json", cwd=folder)
    facts = json.loads(said)
    assert (facts["scheme"], facts["rank"], facts["alpha"]) == ("tied_lora", 4, 8)
    assert (facts["preset"], facts["seed"]) == ("TL6", 1234)  # the defaults, and the config's own seed


@pytest.mark.slow
def test_a_stock_script_answers_with_the_adapter_as_ours_does(folder, adapter):
    run(
        folder, STOCK / "generate.py", CPU, f"model.restore_from_path={builtin_base()}",
        f"model.peft.restore_from_path={adapter}", "model.data.test_ds.file_names=[validation.jsonl]",
    )  # fmt: skip
    (file,) = folder.glob("said*.jsonl")
    answers = {row["input"][: -len(row["pred"])].strip(): row["pred"] for row in map(json.loads, file.open())}
    _, said, _ = forked.script(
        "-m", "nemo_tiedlora", "generate", "--adapter", adapter, "--json", "--tokens", 4, *answers, cwd=folder
    )
    ours = {row["prompt"]: row["completion"] for row in map(json.loads, said.splitlines())}
    assert len(answers) > 3
    assert {prompt: text.strip() for prompt, text in ours.items()} == {p: t.strip() for p, t in answers.items()}


@pytest.mark.slow
def test_a_stock_merge_script_merges_what_ours_merges(folder, adapter):
    run(
        folder, STOCK / "merge.py", CPU, f"gpt_model_file={builtin_base()}", f"lora_model_path={adapter}",
        "merged_model_path=theirs.nemo",
    )  # fmt: skip
    merge(builtin_base(), adapter, folder / "ours.nemo")
    paths = folder / "ours.nemo", folder / "theirs.nemo", builtin_base()
    with open_base(paths[0]) as ours, open_base(paths[1]) as theirs, open_base(paths[2]) as before:
        for layer in range(4):
            weights = [one.weight("self_attention.linear_qkv", layer).float() for one in (ours, theirs, before)]
            change = (weights[0] - weights[2]).norm()
            assert change > 0 and (weights[1] - weights[0]).norm() < 1e-2 * change


@pytest.mark.slow
@pytest.mark.parametrize(
    ("given", "said"),
    [
        ([], "trainer.accelerator='gpu': there is no GPU here; set it to cpu or auto"),
        ([CPU, "model.peft.peft_scheme=tied_lra"], "did you mean 'tied_lora'"),
        ([CPU, *TIED, "model.peft.tied_lora_tuning.rnk=4"], "there is no 'rnk'; did you mean 'rank'"),
        ([CPU, "model.peft.tied_lora_tunig.rank=4"], "did you mean 'tied_lora_tuning'"),
        ([CPU, *TIED, "model.peft.tied_lora_tuning.rank=0"], "model.peft.tied_lora_tuning.rank=0: must be"),
        ([CPU, *TIED, "model.peft.restore_from_path=none.nemo"], "none.nemo"),
    ],
    ids=["accelerator", "scheme", "setting", "section", "value", "late"],
)
def test_a_mistake_is_one_line(folder, given, said):
    if not given and torch.cuda.is_available():
        pytest.skip("there is a GPU")
    _, err = run(folder, STOCK / "finetuning.py", *job(*given), code=2)
    lines = [line for line in err.splitlines() if line.startswith("error:")]
    assert len(lines) == 1 and said in lines[0] and "Traceback" not in err, err[-2000:]


@pytest.mark.slow
def test_what_is_no_script_is_refused_and_a_scripts_own_ends_are_its_own(folder):
    (folder / "rows.txt").write_text("print(1)\n")
    (folder / "ends.py").write_text("import sys\nprint(sys.argv, __name__)\nsys.exit(3)\n")
    (folder / "fails.py").write_text("def f():\n    raise LookupError('mine')\n\n\nf()\n")
    (folder / "asks.py").write_text("from lightning.pytorch import Trainer\nTrainer(accelerator='gpu')\n")
    assert "no such file" in run(folder, "none.py", code=2)[1]
    assert "not a Python file" in run(folder, "rows.txt", code=2)[1]
    out, _ = run(folder, "ends.py", "--help", "a=b", code=3)
    assert out.splitlines()[-1] == f"{[str(folder / 'ends.py'), '--help', 'a=b']} __main__"
    _, err = run(folder, "fails.py", code=1)
    assert "LookupError: mine" in err and "nemo_tiedlora" not in err
    if not torch.cuda.is_available():
        assert "accelerator='gpu': there is no GPU here" in run(folder, "asks.py", code=2)[1]
    _, err = run(folder, STOCK / "finetuning.py", *job(CPU, *TIED, "fail=true"), code=1)
    assert "LookupError: the script's own" in err and "stock_script.py" not in err


@pytest.mark.thorough
def test_the_processes_of_other_devices_have_the_scheme_too(folder):
    two = [
        CPU, "model.peft.peft_scheme=vera", "trainer.devices=2", "trainer.max_steps=2", "exp_manager.exp_dir=two",
    ]  # fmt: skip
    line = [sys.executable, *RUN, str(STOCK / "finetuning.py"), *job(*two)]
    environment = toy.FRESH | {"PYTHONPATH": str(ROOT)}
    done = subprocess.run(line, cwd=folder, capture_output=True, text=True, timeout=300, env=environment)
    assert done.returncode == 0 and list((folder / "two").rglob("*.nemo")), done.stderr[-2000:]


@pytest.mark.thorough
def test_a_stock_script_runs_under_torchrun(folder):
    two = [
        CPU, "model.peft.peft_scheme=vera", "trainer.devices=2", "model.tensor_model_parallel_size=2",
        "trainer.max_steps=2", "exp_manager.exp_dir=torchrun",
    ]  # fmt: skip
    ended = [one.finish() for one in forked.torchrun(2, *RUN, STOCK / "finetuning.py", *job(*two), cwd=folder)]
    assert [code for code, *_ in ended] == [0, 0], ended[0][2][-2000:]
    assert list((folder / "torchrun").rglob("*.nemo"))


def nvidias(folder, name, *configs):
    """NVIDIA's own script in a folder of its own, with its configs beside it."""
    for file in (name, *configs):
        path = folder / "nvidia" / file
        path.parent.mkdir(parents=True, exist_ok=True)
        if CHECKOUT:
            path.write_bytes((Path(CHECKOUT) / file).read_bytes())
            continue
        try:
            with urllib.request.urlopen(f"{REPOSITORY}/{file}", timeout=10) as page:
                path.write_bytes(page.read())
        except OSError as error:
            pytest.skip(f"NVIDIA's repository cannot be reached ({error}); NEMO_CHECKOUT=FOLDER names a copy")
    return folder / "nvidia" / name


@pytest.mark.thorough
def test_nvidias_own_fine_tuning_script_takes_a_scheme(folder):
    script = nvidias(
        folder, f"{TUNING}/megatron_gpt_finetuning.py", f"{TUNING}/conf/megatron_gpt_finetuning_config.yaml"
    )
    own = [
        CPU, *TIED, "trainer.precision=32", "trainer.max_steps=2", "trainer.val_check_interval=2",
        "exp_manager.exp_dir=nvidias", "exp_manager.name=nvidias",
        "model.global_batch_size=4", "model.micro_batch_size=2",
        "model.data.train_ds.concat_sampling_probabilities=[1.0]", "model.data.validation_ds.names=[v]",
        "model.data.train_ds.max_seq_length=48", "model.data.validation_ds.max_seq_length=48",
    ]  # fmt: skip
    run(folder, script, *job(*own))
    assert list((folder / "nvidias").rglob("*.nemo"))
