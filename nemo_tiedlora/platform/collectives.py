"""What stands in for the order that a CUDA stream gives to collectives."""

from __future__ import annotations

import functools

import torch

from nemo_tiedlora.platform.patch import Restore, patch


@patch(needed=lambda: not torch.cuda.is_available())
def ordered_collectives(restore: Restore) -> None:
    """NeMo starts gradient reductions with `async_op` and never waits: on a GPU, what comes later in the stream does.

    gloo runs them in threads of its own; whoever reads the gradients next would read some that are not reduced yet.
    """
    stock = torch.distributed.all_reduce

    @functools.wraps(stock)
    def all_reduce(*args, **kwargs):
        work = stock(*args, **kwargs)
        if work is not None:
            work.wait()
        return work

    restore.set(torch.distributed, "all_reduce", all_reduce)
