"""A patch: what is replaced, why, when it is needed, and how it is taken back."""

from __future__ import annotations

import importlib.util
import inspect
from collections.abc import Callable, MutableMapping
from contextlib import ExitStack
from dataclasses import dataclass
from typing import Any

_ABSENT = object()


class Restore(ExitStack):
    """Replaces things and remembers how to put the very same objects back, in reverse order."""

    def set(self, owner: Any, name: str, value: Any) -> None:
        """Set an attribute of a module or class.

        The owner's own dictionary is read, not `getattr`: that keeps descriptors (a `staticmethod` object, say) as
        they are, and tells an attribute the owner has from one it inherits, which must be deleted again.
        """
        before = vars(owner).get(name, _ABSENT)
        self.callback(delattr, owner, name) if before is _ABSENT else self.callback(setattr, owner, name, before)
        setattr(owner, name, value)

    def set_item(self, mapping: MutableMapping, key: Any, value: Any) -> None:
        """Set a key of a dictionary-like object (`os.environ`, a registry)."""
        before = mapping.get(key, _ABSENT)
        self.callback(mapping.pop, key, None) if before is _ABSENT else self.callback(mapping.__setitem__, key, before)
        mapping[key] = value


@dataclass(frozen=True)
class Patch:
    """One deviation from the stock host.

    name: what it stands in for; reason: why it exists; needed: whether this machine and these versions call for it;
    apply: puts it in force through a `Restore`, which takes it back.
    """

    name: str
    reason: str
    needed: Callable[[], bool]
    apply: Callable[[Restore], None]

    def __str__(self) -> str:
        return f"{self.name}: {' '.join(self.reason.split())}"


def patch(needed: Callable[[], bool]) -> Callable[[Callable[[Restore], None]], Patch]:
    """Declare a function as a patch: its name is the patch's name, its docstring the reason it exists."""
    return lambda apply: Patch(apply.__name__, inspect.getdoc(apply), needed, apply)


def missing(*modules: str) -> Callable[[], bool]:
    """A `needed` which holds while at least one of the modules cannot be imported."""
    return lambda: any(importlib.util.find_spec(module) is None for module in modules)
