"""What the commands show: facts on standard output, progress on standard error."""

from __future__ import annotations

import json
import sys
from collections.abc import Callable, Iterable
from functools import cache
from typing import TYPE_CHECKING, NoReturn, TypeVar

from nemo_tiedlora.errors import UsageError
from nemo_tiedlora.extras import lacking
from nemo_tiedlora.ranks import is_first_rank

if TYPE_CHECKING:
    import typer

#: What a base can be given as, besides a name.
BASES = "a .nemo, a Hugging Face model's folder or a GGUF file"
Item = TypeVar("Item")


def show(facts: dict, as_json: bool) -> None:
    """Print ``facts`` one to a line, or as JSON."""
    if as_json:
        print(json.dumps(facts, indent=2, ensure_ascii=False))
        return
    width = max(map(len, facts))
    for name, value in facts.items():
        # Not a table of rich's: it would cut long values where it takes the output to be narrow.
        print(f"{name:{width}}  {value:,}" if type(value) is int else f"{name:{width}}  {value}")


def progress(items: Iterable[Item], task: str, total: int) -> Iterable[Item]:
    """``items``, with a bar while they are gone through; no bar where nobody looks, or without rich."""
    try:
        from rich.console import Console
        from rich.progress import track
    except ModuleNotFoundError:
        return items

    console = Console(stderr=True)
    return track(items, task, total=total, console=console, disable=not console.is_terminal)


@cache
def note(text: str) -> None:
    """Say something worth knowing on standard error: once, however often it is called, and on one rank only."""
    if is_first_rank():
        print(f"note: {text}", file=sys.stderr, flush=True)


def run(
    app: typer.Typer, name: str | None = None, take: Callable[[list[str]], list[str]] = lambda arguments: arguments
) -> None:
    """Run a command, in UTF-8 whatever the locale: a mistake in the input ends in one line and exit code 2.

    Args:
        name: of the command, in what it says of its usage.
        take: takes what is not for ``app`` from the command line, and gives back the rest.
    """
    for stream in (sys.stdout, sys.stderr):
        stream.reconfigure(encoding="utf-8")
    try:
        app(take(sys.argv[1:]), prog_name=name)
    except UsageError as error:
        refuse(error)
    except ModuleNotFoundError as error:
        if not (known := lacking(error)):
            raise
        refuse(known)


def refuse(error: UsageError) -> NoReturn:
    """End a command with what is wrong."""
    print(f"error: {error}", file=sys.stderr)
    sys.exit(2)
