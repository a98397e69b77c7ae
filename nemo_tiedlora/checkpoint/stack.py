"""Many tensors that differ in their layer only, as one: a name per tensor would cost more than some tensors.

``attention_qkv.0.u`` … ``attention_qkv.31.u`` of one shape become ``attention_qkv.0-31.u`` with a new first dimension.
"""

import re

import torch
from torch import Tensor

#: What stands in a key's place for several layers: ``0-31`` or ``0,2,5-7``.
SEVERAL = re.compile(r"\d{1,9}(-\d{1,9})?(,\d{1,9}(-\d{1,9})?)+|\d{1,9}-\d{1,9}", re.ASCII)


def stack(tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    """Tensors by logical key, those of one kind and shape stacked in the order of their layers."""
    kinds: dict[tuple, dict[int, str]] = {}
    stacked = {}
    for key, tensor in tensors.items():
        parts = key.split(".")
        places = [place for place, part in enumerate(parts) if part.isascii() and part.isdecimal()]
        if len(places) == 1:
            place = places[0]
            kind = (*parts[:place], None, *parts[place + 1 :])
            kinds.setdefault((kind, tensor.shape, tensor.dtype), {})[int(parts[place])] = key
        else:
            stacked[key] = tensor
    for (kind, *_), keys in kinds.items():
        layers = sorted(keys)
        if len(layers) == 1:
            stacked[keys[layers[0]]] = tensors[keys[layers[0]]]
        else:
            name = ".".join(_ranges(layers) if part is None else part for part in kind)
            stacked[name] = torch.stack([tensors[keys[layer]] for layer in layers])
    return stacked


def unstack(stacked: dict[str, Tensor]) -> dict[str, Tensor]:
    """The inverse of ``stack``.

    Raises:
        ValueError: a name that does not fit its tensor, or two tensors of one name.
    """
    tensors: dict[str, Tensor] = {}
    for name, tensor in stacked.items():
        parts = name.split(".")
        places = [place for place, part in enumerate(parts) if SEVERAL.fullmatch(part)]
        found = {name: tensor}
        if places:
            rows = tensor.shape[0] if tensor.dim() else 0
            layers = _layers(parts[places[0]], rows)
            if len(set(layers)) != rows:
                raise ValueError(f"{name} has {rows} rows")
            before, after = parts[: places[0]], parts[places[0] + 1 :]
            found = {".".join([*before, str(layer), *after]): row for layer, row in zip(layers, tensor, strict=True)}
        for key in found:
            if key in tensors:
                raise ValueError(f"{key} is there twice")
        tensors |= found
    return tensors


def _ranges(layers: list[int]) -> str:
    runs: list[list[int]] = []
    for layer in layers:
        if runs and layer == runs[-1][-1] + 1:
            runs[-1].append(layer)
        else:
            runs.append([layer])
    return ",".join(str(run[0]) if len(run) == 1 else f"{run[0]}-{run[-1]}" for run in runs)


def _layers(ranges: str, most: int) -> list[int]:
    """The layers that ``ranges`` name; of a range that is too long for ``most`` rows, only as many as show it."""
    layers: list[int] = []
    for part in ranges.split(","):
        first, _, last = part.partition("-")
        layers += range(int(first), min(int(last or first), int(first) + most) + 1)
    return layers
