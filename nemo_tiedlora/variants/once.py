"""Things formed from tensors that only an optimizer changes: formed once per step, used by all its micro-batches."""

from collections.abc import Callable, Hashable, Iterable
from typing import Any

import torch
from torch import Tensor
from torch.optim.optimizer import register_optimizer_step_post_hook

from nemo_tiedlora.variants.base import FrozenWeight


class _Steps:
    """Counts the optimizer steps of this process: fused and main-copy optimizers write tensors without counting up
    their versions."""

    taken = 0

    @classmethod
    def count(cls, optimizer, args, kwargs):
        cls.taken += 1


register_optimizer_step_post_hook(_Steps.count)


class OncePerStep:
    """Remembers what was formed last, by name, until what it was formed from may have changed."""

    def __init__(self):
        self._formed: dict[Hashable, tuple[tuple, Any]] = {}

    def __call__(self, name: Hashable, tensors: Iterable[Tensor], weight: FrozenWeight, form: Callable[[], Any]) -> Any:
        """``form()``, without gradients, or what it gave before.

        Args:
            name: whose result it is.
            tensors, weight: what ``form`` reads.
        """
        state = (_Steps.taken, weight.version, *map(_state, tensors))
        known, formed = self._formed.get(name, (None, None))
        if known != state:
            # Also usable in training if validation forms it: an inference tensor could not be saved for backward.
            with torch.inference_mode(False), torch.no_grad():
                formed = form()
            self._formed[name] = state, formed
        return formed


def _state(tensor: Tensor) -> tuple:
    """Changes when the tensor may have: by an optimizer, by loading, or by moving it."""
    return tensor.data_ptr(), tensor._version, tensor.dtype, tensor.device
