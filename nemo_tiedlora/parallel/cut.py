"""Which part of a tensor this tensor-parallel rank holds.

A tensor is cut along the axis that its layer shards, if it has that axis, and is replicated otherwise:

    column-parallel (qkv, fc1): W is cut along ``out``, so B and v and θ_A are; A, u and θ_B are replicated
    row-parallel (proj, fc2):   W is cut along ``in``,  so A and θ_B are;       B, v, u and θ_A are replicated
"""

from typing import Any

import torch
from megatron.core import parallel_state
from megatron.core.tensor_parallel.layers import set_tensor_model_parallel_attributes
from torch import nn

from nemo_tiedlora.variants import TensorSpec

#: The axis of W that Megatron shards, by kind of parallel linear layer.
SHARDED_AXIS = {"column": "out", "row": "in"}


def cut(whole: torch.Tensor, spec: TensorSpec, parallel: str, blocks: int, ranks: int, rank: int) -> torch.Tensor:
    """The part of ``whole`` that tensor rank ``rank`` of ``ranks`` holds.

    Args:
        parallel: ``column`` or ``row``, as the tensor's layer is.
        blocks: how many matrices of equal size are stacked in the layer's sharded axis, each of which Megatron cuts on
            its own: 2 for a fused gate and up projection, else 1.
    """
    sharded = SHARDED_AXIS[parallel]
    if ranks == 1 or sharded not in spec.axes:
        return whole
    axis = spec.axes.index(sharded)
    return torch.cat([block.chunk(ranks, axis)[rank] for block in whole.chunk(blocks, axis)], axis)


def join(parts: list[torch.Tensor], spec: TensorSpec, parallel: str, blocks: int) -> torch.Tensor:
    """The whole tensor from the parts of all tensor ranks: the inverse of ``cut``."""
    sharded = SHARDED_AXIS[parallel]
    if len(parts) == 1 or sharded not in spec.axes:
        return parts[0]
    axis = spec.axes.index(sharded)
    pieces = [part.chunk(blocks, axis) for part in parts]
    return torch.cat([piece[block] for block in range(blocks) for piece in pieces], axis)


def has_parts(value: Any) -> bool:
    """Whether ranks can hold parts of a value: a tensor's, or an optimizer's of the same shape; a counter has none."""
    return isinstance(value, torch.Tensor) and value.dim() > 0


def mark(parameter: nn.Parameter, spec: TensorSpec, parallel: str) -> None:
    """Tell Megatron whether ``parameter`` is sharded, so that its gradient norm counts every element once."""
    sharded = SHARDED_AXIS[parallel]
    is_sharded = sharded in spec.axes
    set_tensor_model_parallel_attributes(parameter, is_sharded, spec.axes.index(sharded) if is_sharded else -1, 1)


def tensor_ranks() -> tuple[int, int]:
    """Number of tensor-parallel ranks, and this one's number."""
    return (
        parallel_state.get_tensor_model_parallel_world_size(),
        parallel_state.get_tensor_model_parallel_rank(),
    )
