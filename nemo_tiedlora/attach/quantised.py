"""Linear layers whose frozen weights bitsandbytes keeps in 8 or 4 bits."""

from typing import Any

import torch
from torch import Tensor

#: Class of the weight, by what it is called here.
KINDS = {"Params4bit": "4 bits", "Int8Params": "8 bits"}


def kind(linear: Any) -> str | None:
    """What its weight is quantised to; None: it is not, or not by bitsandbytes."""
    weight = type(linear.weight)
    return KINDS.get(weight.__name__) if weight.__module__.startswith("bitsandbytes.") else None


def like(linear: Any) -> Tensor:
    """An empty tensor where the weight is, of the dtype that adapters beside it have."""
    return torch.empty(0, dtype=torch.float32, device=linear.weight.device)


def dequantised(linear: Any) -> Tensor:
    """The weight that the layer multiplies by, (out, in), float32; a copy."""
    weight = linear.weight
    if kind(linear) == KINDS["Params4bit"]:
        from bitsandbytes.functional import dequantize_4bit

        return dequantize_4bit(weight.data, weight.quant_state).float()
    # Its first pass takes the scales from the weight to the layer's state.
    scales = weight.SCB if getattr(weight, "SCB", None) is not None else linear.state.SCB
    return weight.data.float() * (scales.float() / 127)[:, None]
