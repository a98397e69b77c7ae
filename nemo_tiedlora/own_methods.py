"""Methods in a file of the user's own, named on the command line: ``--methods FILE.py``."""

import sys
import traceback
from importlib.util import module_from_spec, spec_from_file_location
from pathlib import Path

from nemo_tiedlora.errors import UsageError

OPTION = "--methods"
EPILOG = "--methods FILE.py, anywhere on the command line, adds the methods of a file of your own."
#: The files that were loaded into this process.
LOADED: list[Path] = []


def take(arguments: list[str]) -> list[str]:
    """Load the files that a command line names, and give back the rest of it.

    Raises:
        UsageError: a file that is not there, that does not run, or that adds no method.
    """
    left, given = [], iter(arguments)
    for argument in given:
        name, equals, value = argument.partition("=")
        if name != OPTION:
            left.append(argument)
            continue
        path = value if equals else next(given, None)
        if not path:
            raise UsageError("methods", path, "name a Python file: --methods FILE.py")
        load(Path(path))
    return left


def load(path: Path) -> None:
    """Run a file, which adds its methods: ``METHODS.add(Method(...))``.

    Raises:
        UsageError: as ``take``.
    """
    from nemo_tiedlora.variants.registry import METHODS

    path = path.resolve()
    if path in LOADED:
        return
    spec = spec_from_file_location(f"nemo_tiedlora_methods_{len(LOADED)}_{path.stem}", path)
    if not path.is_file() or spec is None or spec.loader is None:
        raise UsageError("methods", str(path), "no such Python file")
    known, module = set(METHODS), module_from_spec(spec)
    sys.modules[spec.name] = module  # dataclasses look their module up
    try:
        spec.loader.exec_module(module)
    except UsageError as error:
        raise error.under(f"methods {path}") from None
    except Exception as error:
        line = traceback.extract_tb(error.__traceback__)[-1]
        where = f" ({line.filename}, line {line.lineno})"
        raise UsageError("methods", str(path), f"does not run: {type(error).__name__}: {error}{where}") from error
    if set(METHODS) == known:
        raise UsageError("methods", str(path), "adds no method; docs/adding-a-method.md shows how: METHODS.add(...)")
    LOADED.append(path)
