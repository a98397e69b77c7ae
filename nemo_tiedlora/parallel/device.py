"""Where tensors must be for ranks to exchange them."""

import torch


def device_of(group: torch.distributed.ProcessGroup | None = None) -> str:
    """The device of a group's collectives; None is all ranks.

    A rank that has no tensor to take it from, such as a pipeline stage that trains nothing, takes part in them too.
    """
    return "cuda" if torch.distributed.get_backend(group) == "nccl" else "cpu"
