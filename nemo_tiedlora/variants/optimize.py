"""What an optimizer must know about an adapter: LoRA+'s two learning rates, and DynaLoRA's inactive tensors.

LoRA+ (arXiv:2402.12354) trains B with a learning rate ``lr_ratio`` times that of A; here, all that B_l is made of.
"""

from collections.abc import Callable
from functools import partial
from typing import Any

from torch.optim import Optimizer

from nemo_tiedlora.variants.bank import Bank
from nemo_tiedlora.variants.base import Variant
from nemo_tiedlora.variants.dynamic import Alone, Dynamic


def param_groups(bank: Bank, adapter: str = "adapter") -> list[dict[str, Any]]:
    """The adapter's trained tensors as an optimizer's parameter groups, with what ``Conductor`` needs to know.

    Each group has the name of its ``adapter``, its ``lr_ratio`` and its tensors' ``keys``; under DynaLoRA, one tensor.
    """
    dynamic = isinstance(bank.variant, Dynamic)
    groups: dict[Any, dict[str, Any]] = {}
    for key, (spec, tensor) in bank.trained().items():
        ratio = bank.variant.config.lr_ratio if spec.factor == "B" else 1.0
        fresh = {"params": [], "keys": [], "adapter": adapter, "lr_ratio": ratio}
        group = groups.setdefault(key if dynamic else ratio, fresh)
        group["params"].append(tensor)
        group["keys"].append(key)
    return list(groups.values())


class Conductor:
    """Goes with an optimizer over the groups of ``param_groups`` and makes each of its steps the method's.

    Before a step it sets every group's learning rate and takes the gradients of inactive tensors away, so that they
    and their optimizer state stay as they are; afterwards it puts the schedule's learning rate back and lets DynaLoRA
    advance. With ``optimizer: local``, a tensor's n-th active step has the learning rate that the schedule gave to the
    n-th step of training.

    Args:
        optimizer: any, over those groups or copies of their tensors in the same groups.
        variant: the source of factors.
        adapter: its name in the groups.
        ranks: adds up DynaLoRA's scores; None: there is one process.
    """

    def __init__(self, optimizer: Optimizer, variant: Variant, adapter: str = "adapter", ranks: Alone | None = None):
        self.adapter = adapter
        self.dynamic = variant if isinstance(variant, Dynamic) else None
        self.local = self.dynamic is not None and self.dynamic.config.optimizer == "local"
        self.ranks = ranks
        #: The schedule's learning rate at every step so far, and how many steps each tensor has taken.
        self.rates: list[float] = []
        self.steps: dict[str, int] = {}
        self._put_back: list[Callable[[], None]] = []
        self._hooks = (optimizer.register_step_pre_hook(self._before), optimizer.register_step_post_hook(self._after))

    def _before(self, optimizer: Optimizer, args, kwargs) -> None:
        active = self.dynamic.active_keys() if self.dynamic else None
        groups = [group for group in optimizer.param_groups if group.get("adapter") == self.adapter]
        if self.local:
            self.rates.append(optimizer.param_groups[0]["lr"])
        for group in groups:
            if active is not None and active.isdisjoint(group["keys"]):
                self._hold(group)
            else:
                self._set_rate(group)

    def _set_rate(self, group: dict[str, Any]) -> None:
        scheduled = group["lr"]
        self._put_back.append(partial(group.update, lr=scheduled))
        if self.local:
            scheduled = self.rates[self.steps.get(group["keys"][0], 0)]
        group["lr"] = scheduled * group["lr_ratio"]

    def _hold(self, group: dict[str, Any]) -> None:
        """Without a gradient no optimizer touches a tensor or its state, but some count steps per group."""
        for tensor in group["params"]:
            self._put_back.append(partial(setattr, tensor, "grad", tensor.grad))
            tensor.grad = None
        if "step" in group:
            self._put_back.append(partial(group.update, step=group["step"]))

    def _after(self, optimizer: Optimizer, args, kwargs) -> None:
        for put_back in self._put_back:
            put_back()
        self._put_back.clear()
        if self.dynamic:
            for key in self.dynamic.active_keys():  # also those that are on another pipeline stage
                self.steps[key] = self.steps.get(key, 0) + 1
            self.dynamic.advance(self.ranks)

    def leave(self) -> None:
        """Let the optimizer be."""
        for hook in self._hooks:
            hook.remove()

    def state_dict(self) -> dict[str, Any]:
        """What a resumed run needs; JSON can hold it."""
        dynamic = self.dynamic.state_dict() if self.dynamic else None
        return {"rates": self.rates, "steps": self.steps, "dynamic": dynamic}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Go on from what ``state_dict`` gave."""
        self.rates, self.steps = list(state["rates"]), dict(state["steps"])
        if self.dynamic:
            self.dynamic.load_state_dict(state["dynamic"])
