"""Heads for a task, which are trained whole, beside an adapter's file."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from torch import Tensor

from nemo_tiedlora.errors import UsageError
from nemo_tiedlora.files import write_bytes
from nemo_tiedlora.huggingface.placing import heads_of

if TYPE_CHECKING:
    from torch import nn

FILE = "heads.safetensors"


def write(model: nn.Module, heads: Sequence[str], folder: Path) -> None:
    """Write the heads' tensors into an adapter's folder; where there are no heads, nothing."""
    from safetensors.torch import save

    if heads:
        write_bytes(folder / FILE, save({name: tensor.detach().cpu() for name, tensor in _parameters(model, heads)}))


def read(model: nn.Module, folder: Path) -> list[tuple[Tensor, Tensor]]:
    """The parameters of the model's heads, each with what the adapter's folder has for it.

    Raises:
        UsageError: the folder has no heads, or other ones than the model; or the file is damaged.
    """
    from safetensors import SafetensorError
    from safetensors.torch import load

    path, heads = folder / FILE, heads_of(model)
    if not heads and not path.is_file():
        return []
    if not path.is_file():
        way_out = f"there is no {FILE} in it, which has {', '.join(heads)} of a {type(model).__name__}"
        raise UsageError("adapter", str(folder), way_out)
    try:
        saved = load(path.read_bytes())
    except (SafetensorError, OSError) as error:
        raise UsageError("adapter", str(path), f"damaged or cut off ({error})") from None
    here = dict(_parameters(model, heads))
    for name in sorted(saved.keys() | here.keys()):
        shapes = [tuple(tensors[name].shape) if name in tensors else "nothing" for tensors in (saved, here)]
        if shapes[0] != shapes[1]:
            way_out = f"{name} in it is {shapes[0]}; of a {type(model).__name__} it is {shapes[1]}"
            raise UsageError("adapter", str(path), way_out)
        if not saved[name].isfinite().all():
            raise UsageError("adapter", str(path), f"{name} in it has NaN or infinity in it")
    return [(here[name], tensor) for name, tensor in saved.items()]


def _parameters(model: nn.Module, heads: Sequence[str]) -> list[tuple[str, nn.Parameter]]:
    return [
        (f"{head}.{name}", parameter)
        for head in heads
        for name, parameter in model.get_submodule(head).named_parameters()
    ]
