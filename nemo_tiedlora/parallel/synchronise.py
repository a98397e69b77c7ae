"""The one place where gradients of factors are made whole: once per optimizer step, in flat buckets, before clipping.

A replicated tensor's gradient is partial on every tensor rank if it comes through the rank's part of a sharded tensor,
or of the tokens. A tensor that several pipeline stages hold gets a gradient from the layers of each.
"""

from collections.abc import Callable, Iterable, Mapping
from typing import Any

import torch
from megatron.core import parallel_state
from torch import Tensor

from nemo_tiedlora.parallel.cut import SHARDED_AXIS
from nemo_tiedlora.parallel.device import device_of
from nemo_tiedlora.variants import TensorSpec


def partial(spec: TensorSpec, parallel: str, sequence_parallel: bool) -> bool:
    """Whether every tensor rank knows only a part of a tensor's gradient, to be summed.

    A's gradient is whole on every rank of a column-parallel layer, and B's on every rank of a row-parallel one:
    ``EXCHANGES`` sees to that. u's comes through B. With sequence parallelism all are of the rank's own tokens.
    """
    beside_cut = {"column": ("B", "u"), "row": ("A",)}[parallel]
    return SHARDED_AXIS[parallel] not in spec.axes and (sequence_parallel or spec.factor in beside_cut)


class _SharedGradient(torch.autograd.Function):
    @staticmethod
    def forward(ctx, tensor):
        return tensor.view_as(tensor)

    @staticmethod
    def backward(ctx, grad):
        return grad / parallel_state.get_tensor_model_parallel_world_size()


def shared_gradient(tensor: Tensor) -> Tensor:
    """The tensor; of a gradient that every tensor rank has whole, each takes its share, so that their sum is right."""
    return _SharedGradient.apply(tensor)


class Synchroniser:
    """Sums what has to be summed of one adapter's gradients.

    Args:
        sizes: number of elements of every trained tensor on this rank, by key.
        partials: the keys whose gradients are partial per tensor rank.
    """

    def __init__(self, sizes: Mapping[str, int], partials: Iterable[str]):
        self.partials = sorted(partials) if parallel_state.get_tensor_model_parallel_world_size() > 1 else []
        self.tied: dict[str, int] = {}
        #: Of the tied keys, those that an earlier stage holds too: they count there in the gradient norm.
        self.counted_elsewhere: set[str] = set()
        stages = parallel_state.get_pipeline_model_parallel_world_size()
        if stages > 1:
            held: list[dict[str, int]] = [{}] * stages
            group = parallel_state.get_pipeline_model_parallel_group()
            torch.distributed.all_gather_object(held, dict(sizes), group=group)
            holders: dict[str, list[int]] = {}
            for stage, keys in enumerate(held):
                for key in keys:
                    holders.setdefault(key, []).append(stage)
            self.tied = {key: held[stages[0]][key] for key, stages in sorted(holders.items()) if len(stages) > 1}
            here = parallel_state.get_pipeline_model_parallel_rank()
            self.counted_elsewhere = {key for key in self.tied if key in sizes and holders[key][0] < here}

    def __call__(self, tensors: Mapping[str, Tensor], active: set[str] | None = None, attribute: str = "grad") -> None:
        """Complete the gradients of ``tensors``, by key, in place.

        Args:
            active: the keys that have gradients this step; None means all.
            attribute: where a tensor keeps its gradient; with Megatron's data parallelism ``main_grad``.
        """
        wanted: Callable[[str], bool] = (lambda key: True) if active is None else active.__contains__
        partials = {key: tensors[key].numel() for key in self.partials if key in tensors and wanted(key)}
        _sum(tensors, partials, parallel_state.get_tensor_model_parallel_group, attribute)
        tied = {key: size for key, size in self.tied.items() if wanted(key)}
        _sum(tensors, tied, parallel_state.get_pipeline_model_parallel_group, attribute)


def _sum(tensors: Mapping[str, Tensor], sizes: Mapping[str, int], group: Callable[[], Any], attribute: str) -> None:
    """All-reduce the gradients of ``sizes``'s keys in one flat bucket; a key that is not here adds nothing."""
    if not sizes:
        return
    gradients = {key: getattr(tensors[key], attribute) for key in sizes if key in tensors}
    bucket = torch.zeros(sum(sizes.values()), dtype=torch.float32, device=device_of(group()))
    parts = dict(zip(sizes, bucket.split(list(sizes.values())), strict=True))
    for key, part in parts.items():
        if gradients.get(key) is not None:
            part.copy_(gradients[key].flatten())
    torch.distributed.all_reduce(bucket, group=group())
    for key, gradient in gradients.items():
        if gradient is None:
            tensors[key].grad = parts[key].view_as(tensors[key]).to(tensors[key].dtype)
        else:
            gradient.copy_(parts[key].view_as(gradient))
