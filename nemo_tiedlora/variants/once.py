"""Things formed from tensors that only an optimizer changes: formed once per step, used by all its micro-batches.

Fused and main-copy optimizers write tensors without counting up their versions. Where somebody counts for them
(``attach.Contract``), versions tell when to form anew; elsewhere, nothing that a step may follow is used again.
"""

from collections.abc import Callable, Hashable, Iterable
from typing import Any

import torch
from torch import Tensor

from nemo_tiedlora.variants.weight import FrozenWeight

_COUNTED = "_writes_are_counted"


def count_writes(tensors: Iterable[Tensor], counted: bool = True) -> None:
    """Say whether ``written`` is called for these tensors whenever an optimizer may have written them."""
    for tensor in tensors:
        setattr(tensor, _COUNTED, counted)


def written(tensors: Iterable[Tensor]) -> None:
    """An optimizer may have written these tensors: count their versions up."""
    torch.autograd.graph.increment_version(list(tensors))


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
        tensors = tuple(tensors)
        state = (weight.version, *map(_state, tensors))
        known, formed = self._formed.pop(name, (None, None))
        if known != state:
            # Also usable in training if validation forms it: an inference tensor could not be saved for backward.
            with torch.inference_mode(False), torch.no_grad():
                formed = form()
        if any(map(_about_to_change, tensors)):
            self._formed.clear()  # others too: a layer that this pass leaves out may share the tensors
        else:
            self._formed[name] = state, formed
        return formed


def _about_to_change(tensor: Tensor) -> bool:
    """Whether an optimizer may write it next without counting: it has a gradient, or this pass is to give it one."""
    trained = tensor.requires_grad and not getattr(tensor, _COUNTED, False)
    return trained and (torch.is_grad_enabled() or tensor.grad is not None)


def _state(tensor: Tensor) -> tuple:
    """Changes when the tensor does: by loading, by moving it, or by an optimizer that counts or is counted for."""
    return tensor.data_ptr(), tensor._version, tensor.dtype, tensor.device
