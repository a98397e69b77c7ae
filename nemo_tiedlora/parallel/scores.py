"""DynaLoRA's scores from all ranks, so that every rank chooses the same modules."""

import torch
from megatron.core import parallel_state
from torch import Tensor

from nemo_tiedlora.parallel.device import device_of
from nemo_tiedlora.variants.dynamic import Alone


class Ranks(Alone):
    """Adds up powers over the ranks that hold parts of one sample's values, and scores over samples and stages.

    Args:
        split: for every part and module, whether the tensor ranks hold parts of the values (1) or all the same (0):
            (parts, modules).
    """

    def __init__(self, split: Tensor):
        ranks = parallel_state.get_tensor_model_parallel_world_size()
        self.share = split + (1 - split) / ranks

    def within(self, powers: Tensor) -> Tensor:
        powers = powers.to(device_of())
        if parallel_state.get_tensor_model_parallel_world_size() > 1:
            powers = powers * self.share.to(powers)[:, :, None]
            torch.distributed.all_reduce(powers, group=parallel_state.get_tensor_model_parallel_group())
        if parallel_state.get_context_parallel_world_size() > 1:
            torch.distributed.all_reduce(powers, group=parallel_state.get_context_parallel_group())
        return powers

    def across(self, scores: Tensor) -> Tensor:
        torch.distributed.all_reduce(scores, group=parallel_state.get_data_parallel_group())
        torch.distributed.all_reduce(scores, group=parallel_state.get_pipeline_model_parallel_group())
        torch.distributed.broadcast(scores, 0)  # the same bits everywhere, whatever the order of the sums
        return scores
