"""The scripts of ``examples/`` as commands, so that an installed package is enough to run them."""

import sys
from pathlib import Path
from runpy import run_path

from nemo_tiedlora.own_methods import LOADED, OPTION

PACKAGE = Path(__file__).parent
#: In the package where that is installed, with ``conf`` beside it; beside the package in a checkout.
EXAMPLES = next((path for path in (PACKAGE / "examples", PACKAGE.parent / "examples") if path.is_dir()), PACKAGE)

_command: str | None = None


def run(script: str, command: str, arguments: list[str]) -> None:
    """Do what ``python examples/SCRIPT ARGUMENTS`` does; what it says of its usage names ``command`` instead.

    The script is the program while it runs: Lightning starts further processes by ``sys.argv`` and ``__main__``.
    """
    global _command
    _command = command
    sys.argv = [str(EXAMPLES / script), *arguments, *(f"{OPTION}={path}" for path in LOADED)]
    run_path(sys.argv[0], run_name="__main__")


def command() -> str | None:
    """The command that runs the script of this process; None where it is run by its file."""
    return _command
