"""What tensor ranks exchange per layer and micro-batch: the product x Aᵀ, which is rank wide, and its gradient.

| layer  | sequence parallel | forward, on x Aᵀ  | backward, on dL/d(x Aᵀ) |
|--------|-------------------|-------------------|-------------------------|
| column | no                | –                 | all-reduce              |
| column | yes               | all-gather        | reduce-scatter          |
| row    | no                | all-reduce        | –                       |
| row    | yes               | reduce-scatter    | all-gather              |

A column-parallel layer's ranks hold rows of B: each knows a part of dL/d(x Aᵀ). A row-parallel layer's ranks hold
columns of A: each knows a part of x Aᵀ. Under sequence parallelism the tokens outside (column: of x, row: of y) are
spread over the ranks as well. Gathering and scattering go along the first dimension, which the sequence leads.
"""

import torch
from megatron.core import parallel_state
from megatron.core.tensor_parallel.mappings import _gather_along_first_dim, _reduce_scatter_along_first_dim

from nemo_tiedlora.ops import Exchange
from nemo_tiedlora.parallel.device import device_of


def all_reduce(tensor: torch.Tensor) -> torch.Tensor:
    """The sum over the tensor ranks."""
    tensor = tensor.contiguous()
    torch.distributed.all_reduce(tensor, group=parallel_state.get_tensor_model_parallel_group())
    return tensor


def all_gather(tensor: torch.Tensor) -> torch.Tensor:
    """All tensor ranks' tensors, one after the other along the first dimension."""
    return _gather_along_first_dim(tensor.contiguous(), group=parallel_state.get_tensor_model_parallel_group())


def reduce_scatter(tensor: torch.Tensor) -> torch.Tensor:
    """This rank's block, along the first dimension, of the sum over the tensor ranks."""
    return _reduce_scatter_along_first_dim(tensor.contiguous(), group=parallel_state.get_tensor_model_parallel_group())


def agreed(tensor: torch.Tensor) -> torch.Tensor:
    """The tensor as the first of the ranks that hold the same layers has it."""
    tensor = tensor.to(device_of(), copy=True).contiguous()
    group = parallel_state.get_tensor_and_data_parallel_group(with_context_parallel=True)
    torch.distributed.broadcast(tensor, torch.distributed.get_process_group_ranks(group)[0], group=group)
    return tensor


def nothing(tensor: torch.Tensor) -> torch.Tensor:
    """The tensor as it is."""
    return tensor


#: (kind of layer, sequence parallel) → what is done on the way forward and on the way back.
EXCHANGES = {
    ("column", False): Exchange(nothing, all_reduce),
    ("column", True): Exchange(all_gather, reduce_scatter),
    ("row", False): Exchange(all_reduce, nothing),
    ("row", True): Exchange(reduce_scatter, all_gather),
}
