"""Install pinned requirements into the environment of this Python and say how far it is: pip is silent for minutes.

python tools/install.py requirements.txt
"""

import re
import shutil
import subprocess
import sys
import sysconfig
import tempfile
import time
from pathlib import Path

#: Measured with requirements.txt on two cores.
DISK_GB, DOWNLOAD_GB, MINUTES = 2.2, 0.6, "1 to 3"
#: Seconds between two looks at pip, and between two lines where output is not a terminal.
LOOK_EVERY, LINE_EVERY = 0.5, 10.0
OPTIONS = ["--disable-pip-version-check", "--no-deps", "--no-compile", "--no-color", "--progress-bar", "off"]
#: A warning about pip's settings on this machine, not about a package.
NOT_NEWS = "is ignored: it is either a non-existing path or lacks a specific scheme"


def install(requirements: Path) -> int:
    """Run pip and return its exit code; where it fails, show what it said last."""
    total = len(re.findall(r"^[^#\s]", requirements.read_text(), re.MULTILINE))
    packages = Path(sysconfig.get_paths()["purelib"])
    free = shutil.disk_usage(packages).free / 1e9
    print(
        f"{total} packages: about {DISK_GB} GB on disk ({free:.0f} GB are free), about {DOWNLOAD_GB} GB to download;"
        f" without the download about {MINUTES} minutes",
        flush=True,
    )
    started, before = time.monotonic(), _installed(packages)
    with tempfile.TemporaryDirectory() as folder:
        log = Path(folder) / "pip.log"
        command = [sys.executable, "-m", "pip", "install", *OPTIONS, "-r", str(requirements)]
        with log.open("ab") as stream:
            pip = subprocess.Popen(command, stdout=stream, stderr=subprocess.STDOUT)
        next_line = started
        while pip.poll() is None:
            time.sleep(LOOK_EVERY)
            if sys.stdout.isatty():
                print(f"\r\033[K{progress(_read(log), total, _installed(packages) - before)}", end="", flush=True)
            elif time.monotonic() > next_line:
                next_line = time.monotonic() + LINE_EVERY
                print(progress(_read(log), total, _installed(packages) - before), flush=True)
        if sys.stdout.isatty():
            print("\r\033[K", end="")
        if pip.returncode:
            said = [line for line in _read(log).splitlines() if NOT_NEWS not in line]
            print("\n".join(said[-20:]), file=sys.stderr)
        else:
            print(f"installed in {time.monotonic() - started:.0f} s")
    return pip.returncode


def progress(said: str, total: int, installed: int) -> str:
    """pip names every package while it looks for it, and none while it unpacks: then their folders tell."""
    if "\nInstalling collected packages: " in said:
        return f"installing {installed}/{total}"
    names = re.findall(r"^(?:Collecting|Requirement already satisfied:) (\S+)", said, re.MULTILINE)
    return f"fetching {len(names)}/{total} {names[-1]}" if names else "starting pip"


def _read(log: Path) -> str:
    return log.read_text(errors="replace")


def _installed(packages: Path) -> int:
    return len(list(packages.glob("*.dist-info")))


if __name__ == "__main__":
    try:
        sys.exit(install(Path(sys.argv[1])))
    except KeyboardInterrupt:  # pip has it too
        sys.exit(130)
