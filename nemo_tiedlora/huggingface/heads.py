"""Modules that an adapter trains whole, such as heads for a task: its own tensors, in the model while it is active."""

from __future__ import annotations

import json
from collections.abc import Collection, Iterable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from nemo_tiedlora.attach.placed import Placed
from nemo_tiedlora.errors import UsageError, closest
from nemo_tiedlora.files import write_bytes

if TYPE_CHECKING:
    from torch import nn

FILE = "heads.safetensors"
#: In the file's metadata: the modules' names, as JSON.
MODULES = "modules"
#: What transformers calls the last layers of models for a task.
HEADS = ("classifier", "pre_classifier", "score", "qa_outputs", "classification_head", "logits_proj", "regressor")


def heads_of(model: nn.Module) -> list[str]:
    """The model's heads for a task, which are new for every task: trained whole unless something else is said."""
    return [name for name, _ in model.named_children() if name in HEADS]


def named(model: nn.Module, wanted: Sequence[str] | None) -> list[str]:
    """The modules to train whole.

    Args:
        wanted: their names or how they end, as in PEFT's ``modules_to_save``; None: the heads.

    Raises:
        UsageError: no module has such a name; or one cannot be told from the rest of the model.
    """
    if wanted is None:
        return heads_of(model)
    if not isinstance(wanted, list | tuple) or not all(isinstance(name, str) and name for name in wanted):
        raise UsageError("modules_to_save", wanted, "write a list of names, such as ['classifier']; [] is none")
    modules = dict(model.named_modules())
    found: list[str] = []
    for name in wanted:
        ending = [path for path in modules if f".{path}".endswith(f".{name}") and path]
        if not ending:
            last = dict.fromkeys(path.rpartition(".")[2] for path in modules)
            names = [one for one in last if one and not one.isdecimal() and not one.startswith("adapter")]
            raise UsageError("modules_to_save", name, f"no module has this name; {closest(name, names)}")
        found += [path for path in ending if path not in found]
    found = [path for path in found if not path.startswith(tuple(f"{other}." for other in found))]
    for path in found:
        _check(model, path, found)
    return found


def _check(model: nn.Module, path: str, names: Collection[str]) -> None:
    if any(isinstance(module, Placed) for module in model.get_submodule(path).modules()):
        raise UsageError("modules_to_save", path, "has adapted layers in it, which stay frozen; leave one of them out")
    places: dict[int, list[str]] = {}
    for name, parameter in model.named_parameters(remove_duplicate=False):
        places.setdefault(id(parameter), []).append(name)
    tensors = _slots(model, [path])
    if not tensors:
        raise UsageError("modules_to_save", path, "has no tensors; leave it out")
    inside = tuple(f"{name}." for name in names)
    for name, (kind, own) in tensors.items():
        for other in places.get(id(kind[own]), ()):
            if not other.startswith(inside):
                way_out = f"{name} is {other} too; name {other.rpartition('.')[0]} as well, or untie them"
                raise UsageError("modules_to_save", path, way_out)


def _slots(model: nn.Module, names: Iterable[str]) -> dict[str, tuple[dict[str, Tensor | None], str]]:
    """Where modules' parameters and lasting buffers are, by their names in the model."""
    found = {}
    for path in names:
        for name, module in model.get_submodule(path).named_modules(prefix=path):
            for own in module._parameters:
                found[f"{name}.{own}"] = module._parameters, own
            for own in module._buffers.keys() - module._non_persistent_buffers_set:
                found[f"{name}.{own}"] = module._buffers, own
    return {name: found[name] for name in sorted(found) if found[name][0][found[name][1]] is not None}


class Heads:
    """An adapter's own tensors for some of the model's modules, which start as copies of the model's.

    Args:
        names: of the modules.

    Attributes:
        tensors: its own, by their names in the model; the parameters among them want gradients.
    """

    def __init__(self, model: nn.Module, names: list[str]):
        self.names = names
        self._slots = _slots(model, names)
        self._before: dict[str, Tensor] = {}
        copies: dict[int, Tensor] = {}  # what has two names stays one tensor
        self.tensors: dict[str, Tensor] = {}
        for name, (kind, own) in self._slots.items():
            there = kind[own]
            assert there is not None  # or there were no slot
            if id(there) not in copies:
                copy = there.detach().clone()
                is_parameter = isinstance(there, torch.nn.Parameter)
                copies[id(there)] = torch.nn.Parameter(copy) if is_parameter else copy
            self.tensors[name] = copies[id(there)]

    def parameters(self) -> list[nn.Parameter]:
        """Those that are trained, each once."""
        return list(dict.fromkeys(one for one in self.tensors.values() if isinstance(one, torch.nn.Parameter)))

    def in_place(self) -> bool:
        """Whether the model has their parameters, where it should."""
        there = {name: kind[own] for name, (kind, own) in self._slots.items()} if self._before else self.tensors
        return all(there[name] is one for name, one in self.tensors.items() if isinstance(one, torch.nn.Parameter))

    def switch(self, on: bool) -> None:
        """Put them into the model's places, or what was there before; again, nothing happens."""
        if on == bool(self._before):
            return
        for name, (kind, own) in self._slots.items():
            if on:
                self._before[name] = there = kind[own]
                self.tensors[name].data = self.tensors[name].data.to(there.device)  # the model may have moved
                kind[own] = self.tensors[name]
            else:
                self.tensors[name] = kind[own]  # moving a model replaces its buffers
                kind[own] = self._before[name]
        if not on:
            self._before.clear()


def write(model: nn.Module, heads: Heads, folder: Path) -> None:
    """Write the tensors into an adapter's folder; where there are none, as in any such model, nothing."""
    from safetensors.torch import save

    if heads.names or heads_of(model):
        tensors = {name: tensor.detach().cpu().clone() for name, tensor in heads.tensors.items()}
        write_bytes(folder / FILE, save(tensors, {MODULES: json.dumps(heads.names)}))
    else:
        (folder / FILE).unlink(missing_ok=True)


def read(model: nn.Module, folder: Path) -> tuple[list[str], dict[str, Tensor]]:
    """The names of the modules that an adapter's folder has tensors for, and the tensors.

    Raises:
        UsageError: the file is damaged.
    """
    from safetensors import SafetensorError, safe_open

    path, names = folder / FILE, heads_of(model)
    if not path.is_file():
        return names, {}
    try:
        with safe_open(path, "pt") as file:
            said = (file.metadata() or {}).get(MODULES)
            saved = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118  (it is no mapping)
        names = names if said is None else json.loads(said)
        if not isinstance(names, list) or not all(isinstance(name, str) and name for name in names):
            raise ValueError(f"{MODULES} are {said}")
    except (SafetensorError, OSError, ValueError, RecursionError) as error:
        raise UsageError("adapter", str(path), f"damaged or cut off ({error})") from None
    return names, saved


def check(model: nn.Module, names: list[str], saved: dict[str, Tensor], folder: Path) -> None:
    """Whether what ``read`` gave fits the model's modules.

    Raises:
        UsageError: by name, what does not.
    """
    path = folder / FILE
    if names and not path.is_file():
        way_out = f"there is no {FILE} in it, which has {', '.join(names)} of a {type(model).__name__}"
        raise UsageError("adapter", str(folder), way_out)
    modules = dict(model.named_modules())
    for name in names:
        if name not in modules:
            raise UsageError("adapter", str(path), f"is of {name}, which a {type(model).__name__} has not")
    here = {name: kind[own] for name, (kind, own) in _slots(model, names).items()}
    for name in sorted(saved.keys() | here.keys()):
        shapes = [tuple(tensors[name].shape) if name in tensors else "nothing" for tensors in (saved, here)]
        if shapes[0] != shapes[1]:
            way_out = f"{name} in it is {shapes[0]}; of a {type(model).__name__} it is {shapes[1]}"
            raise UsageError("adapter", str(path), way_out)
        if not saved[name].isfinite().all():
            raise UsageError("adapter", str(path), f"{name} in it has NaN or infinity in it")
