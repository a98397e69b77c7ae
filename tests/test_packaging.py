"""The package as pip installs it: whole, and enough to run the main job in any folder."""

import ast
import json
import signal
import subprocess
import sys
import time
from email.parser import Parser
from importlib.metadata import packages_distributions
from pathlib import Path
from shutil import copy, copytree, ignore_patterns

import forked
import pytest
import toy
from packaging.requirements import Requirement
from packaging.specifiers import SpecifierSet
from packaging.utils import canonicalize_name

from nemo_tiedlora.extras import EXTRAS

ROOT = Path(__file__).parents[1]
#: Folders that are installed, by where they come to lie.
INSTALLED = {
    "nemo_tiedlora": "nemo_tiedlora",
    "benchmark_suite": "benchmark_suite",
    "nemo_tiedlora/conf": "conf",
    "nemo_tiedlora/examples": "examples",
}
#: Imported only where a model has layers of theirs.
OF_MODELS = {"bitsandbytes"}
SCRIPT = ROOT / "examples" / "megatron_gpt_finetuning.py"
COMMAND = ("-m", "nemo_tiedlora", "finetune")
SHORT = (
    "trainer.max_steps=2",
    "trainer.val_check_interval=2",
    "model.global_batch_size=8",
    "model.micro_batch_size=4",
    "model.data.validation_ds.global_batch_size=64",
    "model.data.validation_ds.micro_batch_size=32",
    "model.data.validation_ds.metric.name=loss",
    "exp_manager.exp_dir=runs",
    "exp_manager.name=short",
)


@pytest.fixture(scope="module")
def site(tmp_path_factory):
    """A folder into which pip has installed the source archive, and nothing else."""
    source, site = tmp_path_factory.mktemp("source"), tmp_path_factory.mktemp("site")
    for folder in ("nemo_tiedlora", "benchmark_suite", "conf", "examples"):
        copytree(ROOT / folder, source / folder, ignore=ignore_patterns("__pycache__"))
    for name in ("setup.py", "pyproject.toml", "README.md", "LICENSE"):
        copy(ROOT / name, source)
    pack = "from setuptools.build_meta import build_sdist; build_sdist('dist')"
    done = subprocess.run([sys.executable, "-c", pack], cwd=source, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    (archive,) = (source / "dist").iterdir()
    offline = ["--quiet", "--no-index", "--no-deps", "--no-build-isolation", "--disable-pip-version-check"]
    done = subprocess.run(
        [sys.executable, "-m", "pip", "install", *offline, "--target", site, archive], capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr
    return site


def files(folder):
    return {
        str(path.relative_to(folder)): path.read_bytes()
        for path in sorted(folder.rglob("*"))
        if path.is_file() and path.suffix != ".pyc"
    }


def test_every_file_of_the_checkout_is_in_the_archive_and_is_installed(site):
    ours = {"nemo_tiedlora": {}, "benchmark_suite": {}}
    for place, folder in INSTALLED.items():
        room, _, below = place.partition("/")
        ours[room] |= {f"{below}/{name}".lstrip("/"): content for name, content in files(ROOT / folder).items()}
    for room, expected in ours.items():
        found = files(site / room)
        assert found.keys() == expected.keys()
        assert all(found[name] == content for name, content in expected.items())
    (notice,) = site.glob("*.dist-info/licenses/LICENSE")
    assert notice.read_bytes() == (ROOT / "LICENSE").read_bytes()


def test_what_is_imported_is_required_and_the_tested_versions_fit(site):
    (metadata,) = site.glob("*.dist-info/METADATA")
    required = [Requirement(line) for line in Parser().parsestr(metadata.read_text()).get_all("Requires-Dist")]
    ranges = {}
    for each in required:
        if '"test"' not in str(each.marker):
            name = canonicalize_name(each.name)
            ranges[name] = ranges.get(name, SpecifierSet()) & each.specifier
    pins = dict(line.split("==") for line in (ROOT / "requirements.txt").read_text().split())
    for name, allowed in ranges.items():
        assert pins[name] in allowed, name
    homes, known = packages_distributions(), {*sys.stdlib_module_names, *INSTALLED, *OF_MODELS}
    for path in [path for folder in set(INSTALLED.values()) for path in (ROOT / folder).rglob("*.py")]:
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            names = [each.name for each in node.names] if isinstance(node, ast.Import) else []
            names += [node.module] if isinstance(node, ast.ImportFrom) else []
            for name in {name.partition(".")[0] for name in names} - known:
                assert ranges.keys() & {canonicalize_name(home) for home in homes[name]}, f"{path} imports {name}"


def test_extras_have_what_is_said_to_come_with_them(site):
    (metadata,) = site.glob("*.dist-info/METADATA")
    required = [Requirement(line) for line in Parser().parsestr(metadata.read_text()).get_all("Requires-Dist")]
    core = {each.name for each in required if not each.marker}
    assert core == {"torch", "safetensors", "numpy"}
    homes = packages_distributions()
    for extra, modules in EXTRAS.items():
        own = {canonicalize_name(each.name) for each in required if f'extra == "{extra}"' in str(each.marker)}
        for module in modules:
            assert own & {canonicalize_name(home) for home in homes[module]}, f"{extra} has no {module}"


def tiedlora(site, folder, *arguments):
    """Run the installed command in a folder from which the checkout cannot be seen."""
    return subprocess.run(
        [site / "bin" / "tiedlora", *arguments],
        cwd=folder, env=toy.FRESH | {"PYTHONPATH": str(site)}, capture_output=True, text=True,
    )  # fmt: skip


@pytest.mark.slow
def test_the_installed_command_runs_the_main_job_in_an_empty_folder(site, tmp_path):
    done = tiedlora(site, tmp_path, "finetune", "model.peft.peft_scheme=tied_lora", *SHORT)
    assert done.returncode == 0, done.stderr[-2000:]
    summary = json.loads((tmp_path / done.stdout.splitlines()[-1]).read_text())
    assert summary["scheme"] == "tied_lora" and summary["steps"] == 2 and Path(summary["adapter"]).is_file()
    done = tiedlora(site, tmp_path, "finetune", "--help")
    assert f"All settings: {site}/nemo_tiedlora/conf/megatron_gpt_finetuning_config.yaml" in done.stdout, done.stderr
    done = tiedlora(site, tmp_path, "generate", "--file", "missing.txt")
    assert (done.returncode, done.stderr) == (2, "error: file='missing.txt': no such file\n")


@pytest.mark.parametrize(
    "arguments",
    [
        ("--help",),
        ("--cfg", "job", "model.optim.lr=0.5"),
        ("--hydra-help",),
        ("model.peft.peft_scheme=tied_lra",),
        ("model.pft.x=1",),
        ("--config-name", "missing"),
        ("-m", "model.peft.tied_lora_tuning.rank=0,-1"),
        ("--", "trainer.max_steps=0"),
    ],
)
def test_the_command_takes_what_the_script_takes_and_says_the_same(arguments, tmp_path):
    code, out, err = forked.script(SCRIPT, *arguments, cwd=tmp_path)
    assert out or (code and err)
    out = out.replace(f"Usage: python {SCRIPT}", "Usage: tiedlora finetune")
    assert forked.script(*COMMAND, *arguments, cwd=tmp_path) == (code, out, err)


def test_generate_takes_what_its_script_takes(tmp_path):
    for arguments in (("--tokens", "0"), ("--", "--help")):
        code, out, err = forked.script(ROOT / "examples" / "megatron_gpt_generate.py", *arguments, "hi", cwd=tmp_path)
        err = err.replace("megatron_gpt_generate.py", "tiedlora generate")
        assert forked.script("-m", "nemo_tiedlora", "generate", *arguments, "hi", cwd=tmp_path) == (code, out, err)


def test_a_signal_ends_the_command_like_the_script(tmp_path):
    job = forked.Script(*COMMAND, *SHORT, "trainer.max_steps=999", cwd=tmp_path)
    while not list(tmp_path.rglob("*.lock/job")):
        assert job.poll() is None, job.finish()
        time.sleep(0.02)
    job.send_signal(signal.SIGTERM)
    code, _, err = job.finish()
    assert (code, err.count("\n")) == (128 + signal.SIGTERM, 1) and err.startswith("stopped by SIGTERM; "), err


@pytest.mark.thorough
@pytest.mark.parametrize("launcher", ["torchrun", "Lightning"])
def test_launchers_start_the_command(launcher, tmp_path):
    launched = ("-m", "torch.distributed.run", "--nproc-per-node=2") if launcher == "torchrun" else ()
    done = subprocess.run(
        [sys.executable, *launched, *COMMAND, *SHORT, "trainer.devices=2"],
        cwd=tmp_path, env=toy.FRESH | {"PYTHONPATH": str(ROOT)}, capture_output=True, text=True,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr[-2000:]
    (record,) = tmp_path.rglob("run.json")
    assert json.loads(record.read_text())["processes"] == 2 and len(list(tmp_path.rglob("summary.json"))) == 1
