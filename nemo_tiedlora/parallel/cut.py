"""Which part of a tensor this tensor-parallel rank holds, and the one reduction that follows from it."""

import torch
from megatron.core import parallel_state
from megatron.core.tensor_parallel.layers import set_tensor_model_parallel_attributes
from torch import nn

from nemo_tiedlora.variants import TensorSpec

#: The axis of W that Megatron shards, by kind of parallel linear layer.
SHARDED_AXIS = {"column": "out", "row": "in"}


def cut(whole: torch.Tensor, spec: TensorSpec, sharded: str) -> torch.Tensor:
    """This rank's part of ``whole``: a block along ``sharded`` (``out`` or ``in``) if it has that axis, else all."""
    size = parallel_state.get_tensor_model_parallel_world_size()
    if size == 1 or sharded not in spec.axes:
        return whole
    return whole.chunk(size, spec.axes.index(sharded))[parallel_state.get_tensor_model_parallel_rank()]


def mark(parameter: nn.Parameter, spec: TensorSpec, sharded: str) -> None:
    """Tell Megatron whether ``parameter`` is sharded, so that its gradient norm counts every element once."""
    is_sharded = sharded in spec.axes
    set_tensor_model_parallel_attributes(parameter, is_sharded, spec.axes.index(sharded) if is_sharded else -1, 1)


def sum_over_tensor_ranks(grad: torch.Tensor) -> torch.Tensor:
    """The sum of every tensor rank's ``grad``, in place."""
    torch.distributed.all_reduce(grad, group=parallel_state.get_tensor_model_parallel_group())
    return grad
