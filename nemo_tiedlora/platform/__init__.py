"""Running the host (NeMo + Megatron) without a GPU, Apex or Transformer Engine.

    from nemo_tiedlora import platform

    with platform.host():
        ...                      # NeMo's own classes, scripts and configurations, unchanged

Nothing is patched when this package is imported. `host()` (or `enter()`, for scripts) applies the patches this machine
needs and takes all of them back at the end: the same attribute objects, environment and torch modes as before. Where
CUDA, Apex, Transformer Engine or a fixed NeMo are present, the patches that stand in for them do nothing.

Enter before NeMo objects are built and stay inside while they are used: a model built inside keeps calling the host
from its forward pass. Entering is counted, so entering again returns the same host and only the last exit restores.
The device redirection is a torch function mode, which holds for the thread that entered.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from functools import cache

from nemo_tiedlora.platform.patch import Patch, Restore

__all__ = ["Host", "Patch", "enter", "host", "patches"]


class Host:
    """The host in its patched state: `applied` names the patches in force, `exit()` takes them back."""

    def __init__(self) -> None:
        self._entered = 0
        self._restore: Restore | None = None
        self.applied: tuple[str, ...] = ()

    def enter(self) -> Host:
        """Apply the needed patches; entered already, only count."""
        if not self._entered:
            applied = []
            with Restore() as restore:
                for patch in patches():
                    if patch.needed():
                        patch.apply(restore)
                        applied.append(patch.name)
                self._restore = restore.pop_all()
            self.applied = tuple(applied)
        self._entered += 1
        return self

    def exit(self) -> None:
        """Undo one `enter`; the last one restores everything."""
        if not self._entered:
            raise RuntimeError("the host is not entered")
        self._entered -= 1
        if not self._entered:
            self.applied = ()
            self._restore.close()


_HOST = Host()


def enter() -> Host:
    """Enter the host for good (scripts); `exit()` of the result restores."""
    return _HOST.enter()


@contextmanager
def host() -> Iterator[Host]:
    """Enter the host for a block of code."""
    entered = enter()
    try:
        yield entered
    finally:
        entered.exit()


@cache
def patches() -> tuple[Patch, ...]:
    """Every patch there is, in the order in which they are applied; `needed()` tells which this machine calls for."""
    from nemo_tiedlora.platform import (
        apex,
        checkpoint,
        collectives,
        cuda,
        dataset_helpers,
        fusions,
        nemo_fixes,
        norm,
        tokenizers,
        torchvision,
        transformer_engine,
        unpickling,
    )

    files = (
        cuda,
        collectives,
        fusions,
        norm,
        apex,
        transformer_engine,
        torchvision,
        checkpoint,
        dataset_helpers,
        nemo_fixes,
        tokenizers,
        unpickling,
    )
    return tuple(value for file in files for value in vars(file).values() if isinstance(value, Patch))
