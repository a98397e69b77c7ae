"""Set-up: what pip is doing is shown, and a failure of pip's is one of set-up."""

import subprocess
import sys
from pathlib import Path
from runpy import run_path

import pytest

TOOL = Path(__file__).parents[2] / "tools" / "install.py"
LOCATION = "WARNING: Location '/wheels' is ignored: it is either a non-existing path or lacks a specific scheme."


def install(folder, pip):
    """Run the tool with ``pip``, Python code, in the place of pip."""
    (folder / "pip").mkdir()
    (folder / "pip" / "__init__.py").touch()
    (folder / "pip" / "__main__.py").write_text(f"import sys\nprint({LOCATION!r}, file=sys.stderr)\n{pip}")
    (folder / "requirements.txt").write_text("# pins\none==1\n\ntwo==2\n")
    return subprocess.run([sys.executable, TOOL, "requirements.txt"], cwd=folder, capture_output=True, text=True)


def test_it_says_what_comes_and_when_it_is_done(tmp_path):
    done = install(tmp_path, "import time; time.sleep(1)")
    first, progress, last = done.stdout.splitlines()
    assert first.startswith("2 packages: about ") and "GB on disk" in first and "minutes" in first
    assert progress == "starting pip" and last.startswith("installed in ")
    assert done.returncode == 0 and not done.stderr


def test_a_failure_is_shown_and_kept(tmp_path):
    done = install(tmp_path, "print('ERROR: No matching distribution found for two==2', file=sys.stderr); sys.exit(1)")
    assert done.returncode == 1 and done.stderr == "ERROR: No matching distribution found for two==2\n"


COLLECTED = f"{LOCATION}\nCollecting one==1 (from -r requirements.txt (line 2))\n  Using cached one-1.whl (1 MB)\n"


@pytest.mark.parametrize(
    ("said", "shown"),
    [
        (LOCATION, "starting pip"),
        (COLLECTED, "fetching 1/2 one==1"),
        (f"{COLLECTED}Requirement already satisfied: two==2 in /lib\n", "fetching 2/2 two==2"),
        (f"{COLLECTED}Collecting two==2\nInstalling collected packages: one, two\n", "installing 1/2"),
    ],
)
def test_progress_follows_what_pip_says(said, shown):
    assert run_path(str(TOOL))["progress"](said, total=2, installed=1) == shown
