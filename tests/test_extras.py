"""What the package does with how much of it installed, and what it says of the rest."""

import os
import subprocess
import sys
from pathlib import Path
from shutil import copy, copytree, ignore_patterns

import pytest
import toy

from nemo_tiedlora.errors import UsageError
from nemo_tiedlora.extras import EXTRAS, lacking

ROOT = Path(__file__).parents[1]
HERE = ROOT / "tests" / "extras"
#: The environments: the extra, its script, and the modules that it leaves out.
CORE = {module for modules in EXTRAS.values() for module in modules}
LEFT_OUT = {"core": CORE, "hf": CORE - {*EXTRAS["cli"], *EXTRAS["hf"]}, "cli": CORE - {*EXTRAS["cli"]}}


def without(extra, folder, *arguments):
    """Run a script as if no more than ``extra`` were installed."""
    command = [sys.executable, HERE / "without.py", ",".join(sorted(LEFT_OUT[extra])), *arguments]
    paths = {"PYTHONPATH": f"{ROOT}:{ROOT / 'tests' / 'huggingface'}", "XDG_CACHE_HOME": str(folder / "cache")}
    return subprocess.run(command, cwd=folder, env=toy.FRESH | paths, capture_output=True, text=True)


def with_page(folder):
    """A folder in which ``hf.py`` can be run."""
    folder.mkdir()
    copy(ROOT / "docs" / "transformers.md", folder / "page.md")
    return folder


@pytest.mark.parametrize("extra", ["core", "hf"])
def test_no_more_is_imported_than_is_installed(extra, tmp_path):
    done = without(extra, with_page(tmp_path / "empty") if extra == "hf" else tmp_path, HERE / f"{extra}.py")
    assert done.returncode == 0, done.stderr[-3000:]


@pytest.mark.parametrize(
    ("extra", "arguments", "said"),
    [
        ("core", ("--help",), "error: extra='cli': not installed (there is no module typer): pip install"),
        ("cli", ("finetune",), "error: extra='nemo': not installed (there is no module hydra): pip install"),
        ("cli", ("generate", "hello"), "error: extra='nemo': not installed (there is no module omegaconf): pip"),
    ],
)
def test_a_command_names_the_extra_that_it_needs(extra, arguments, said, tmp_path):
    done = without(extra, tmp_path, "-m", "nemo_tiedlora", *arguments)
    assert (done.returncode, done.stderr.count("\n")) == (2, 1) and done.stderr.startswith(said), done.stderr


def test_what_needs_no_host_runs_without_one(tmp_path):
    shape = ("--layers", "4", "--hidden", "64", "--set", "dora=true")
    done = without("cli", tmp_path, "-m", "nemo_tiedlora", "params", *shape)
    assert done.returncode == 0 and done.stdout.startswith("trainable "), done.stderr
    done = without("cli", tmp_path, ROOT / "examples" / "megatron_gpt_finetuning.py", "--help")
    assert done.returncode == 0 and "Usage: python " in done.stdout, done.stderr
    done = without("cli", tmp_path, ROOT / "examples" / "megatron_gpt_finetuning.py")
    assert done.returncode == 2 and done.stderr.startswith("error: extra='nemo'"), done.stderr


def test_only_modules_of_extras_are_said_to_come_with_one():
    assert isinstance(lacking(ModuleNotFoundError(name="hydra.core")), UsageError)
    assert lacking(ModuleNotFoundError(name="hydrant")) is lacking(ModuleNotFoundError()) is None


@pytest.fixture(scope="module")
def wheel(tmp_path_factory):
    """The package, as it would be uploaded."""
    source = tmp_path_factory.mktemp("source")
    for folder in ("nemo_tiedlora", "benchmark_suite", "conf", "examples"):
        copytree(ROOT / folder, source / folder, ignore=ignore_patterns("__pycache__"))
    for name in ("setup.py", "pyproject.toml", "README.md", "LICENSE"):
        copy(ROOT / name, source)
    pack = "from setuptools.build_meta import build_wheel; build_wheel('dist')"
    subprocess.run([sys.executable, "-c", pack], cwd=source, check=True, capture_output=True)
    (made,) = (source / "dist").iterdir()
    return made


@pytest.mark.thorough
@pytest.mark.parametrize("extra", ["core", "hf"])
def test_in_an_environment_that_pip_has_just_made(extra, wheel, tmp_path):
    """Minutes, and a gigabyte: pip fetches what the wheel asks for."""
    python, folder = tmp_path / "environment" / "bin" / "python", tmp_path / "empty"
    subprocess.run([sys.executable, "-m", "venv", tmp_path / "environment"], check=True)
    pins = (ROOT / "requirements.txt").read_text().split()
    asked = [f"{wheel}[{extra}]" if extra != "core" else wheel, *(pin for pin in pins if pin.startswith("torch=="))]
    pip = [python, "-m", "pip", "install", "--quiet", "--disable-pip-version-check", *asked]
    done = subprocess.run(pip, capture_output=True, text=True)
    if done.returncode and "connection" in done.stderr.lower():
        pytest.skip(f"the package index cannot be reached: {done.stderr.splitlines()[-1]}")
    assert done.returncode == 0, done.stderr
    if extra == "hf":
        with_page(folder)
    else:
        folder.mkdir()
    copy(HERE / f"{extra}.py", tmp_path)
    copy(ROOT / "tests" / "huggingface" / "saved_models.py", tmp_path)
    environment = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}
    environment["XDG_CACHE_HOME"] = str(tmp_path / "cache")
    done = subprocess.run(
        [python, tmp_path / f"{extra}.py"], cwd=folder, env=environment, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr[-3000:]
    found = subprocess.run([python, "-m", "pip", "list"], capture_output=True, text=True).stdout.lower()
    assert "nemo_tiedlora" in found and not {"nemo_toolkit", "megatron-core", "omegaconf"} & set(found.split())
    assert ("transformers" in found.split()) == (extra == "hf")
