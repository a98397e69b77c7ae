"""The training contract: what an optimizer must know about an adapter, and the adapter about the optimizer's steps.

LoRA+ (arXiv:2402.12354) trains B with a learning rate ``lr_ratio`` times that of A; here, all that B_l is made of.
DynaLoRA leaves the tensors of inactive modules as they are, and counts steps. Factors that are formed once per step are
formed anew after one.
"""

from collections.abc import Callable
from functools import partial
from typing import Any

from torch.optim import Optimizer

from nemo_tiedlora.errors import UsageError
from nemo_tiedlora.variants.bank import Bank
from nemo_tiedlora.variants.base import Alone, Variant, Wrapper
from nemo_tiedlora.variants.once import count_writes, written


def lr_ratio(variant: Variant) -> float:
    """LoRA+'s ratio: the setting of the method that has the factors, whatever is put over it."""
    while isinstance(variant, Wrapper):
        variant = variant.inner
    return variant.config.lr_ratio


def error_without(variant: Variant) -> UsageError | None:
    """What to say of training without a contract; None if it makes no difference to what is trained."""
    if variant.changes_with_step:
        what = f"{variant.config.scheme} takes part in every step of the optimizer"
    elif lr_ratio(variant) != 1:
        what = f"lr_ratio={lr_ratio(variant):g} takes part in every step of the optimizer"
    else:
        return None
    way_out = f"{what}; make it of adapter.parameter_groups(lr) and call adapter.attach_to(optimizer) before training"
    return UsageError("optimizer", None, way_out)


def parameter_groups(bank: Bank, adapter: str = "adapter", lr: float | None = None) -> list[dict[str, Any]]:
    """The adapter's trained tensors as an optimizer's parameter groups, with what ``Contract`` needs to know.

    Each group has the name of its ``adapter``, its ``lr_ratio`` and its tensors' ``keys``; under DynaLoRA, one tensor.

    Args:
        lr: the learning rate of every group, before LoRA+'s ratio; None leaves it to the optimizer.
    """
    alone = bank.variant.changes_with_step  # some of them may be held back
    groups: dict[Any, dict[str, Any]] = {}
    for key, (spec, tensor) in bank.trained().items():
        ratio = lr_ratio(bank.variant) if spec.factor == "B" else 1.0
        fresh = {"params": [], "keys": [], "adapter": adapter, "lr_ratio": ratio} | ({} if lr is None else {"lr": lr})
        group = groups.setdefault(key if alone else ratio, fresh)
        group["params"].append(tensor)
        group["keys"].append(key)
    return list(groups.values())


class Contract:
    """Goes with an optimizer and makes each of its steps the method's, until it is detached.

    Before a step it sets every group's learning rate and takes the gradients of inactive tensors away, so that they
    and their optimizer state stay as they are; afterwards it puts the schedule's learning rate back, lets DynaLoRA
    advance, and has what was formed once per step formed anew. With ``optimizer: local``, a tensor's n-th active step
    has the learning rate that the schedule gave to the n-th step of training.

    Args:
        optimizer: over the groups of ``parameter_groups``, or copies of their tensors in the same groups; for a method
            that takes no part in steps, any.
        bank: the adapter's tensors.
        adapter: its name in the groups.
        ranks: adds up DynaLoRA's scores; None: there is one process.

    Raises:
        UsageError: the method takes part in steps, and the optimizer was made of other groups; or it is not torch's.

    Attributes:
        in_force: false once it is detached.
        paused: whether steps are none of the adapter's, as another one is active.
    """

    def __init__(self, optimizer: Optimizer, bank: Bank, adapter: str = "adapter", ranks: Alone | None = None):
        variant = bank.variant
        self.bank, self.adapter, self.ranks, self.paused = bank, adapter, ranks, False
        self.variant = variant
        #: The schedule's learning rate at every step so far, and how many steps each tensor has taken.
        self.rates: list[float] = []
        self.steps: dict[str, int] = {}
        self._put_back: list[Callable[[], None]] = []
        if error_without(variant):
            self._check(optimizer)
        try:
            before = optimizer.register_step_pre_hook(self._before)
            self._hooks = (before, optimizer.register_step_post_hook(self._after))
        except AttributeError:
            way_out = "it does not say when it steps, as torch's own do; give the one that it wraps"
            raise UsageError("optimizer", type(optimizer).__name__, way_out) from None
        count_writes(self._tensors())
        self.in_force = True

    def _tensors(self) -> list:
        return [tensor for _, tensor in self.bank.trained().values()]

    def _check(self, optimizer: Optimizer) -> None:
        placed = {key for group in self._groups(optimizer) for key in group["keys"]}
        missing = sorted(self.bank.trained().keys() - placed)
        if missing:
            way_out = f"{missing[0]} is in none of its groups; make it of adapter.parameter_groups(lr)"
            raise UsageError("optimizer", type(optimizer).__name__, way_out)

    def _groups(self, optimizer: Optimizer) -> list[dict[str, Any]]:
        return [group for group in optimizer.param_groups if group.get("adapter") == self.adapter]

    def _before(self, optimizer: Optimizer, args, kwargs) -> None:
        if self.paused:
            return
        active = self.variant.active_keys()
        if self.variant.own_schedules:  # of its own groups: another adapter's contract may have set the first one's
            self.rates.append((self._groups(optimizer) or optimizer.param_groups)[0]["lr"])
        for group in self._groups(optimizer):
            if active is not None and active.isdisjoint(group["keys"]):
                self._hold(group)
            else:
                self._set_rate(group)

    def _set_rate(self, group: dict[str, Any]) -> None:
        scheduled = group["lr"]
        self._put_back.append(partial(group.update, lr=scheduled))
        if self.variant.own_schedules:
            scheduled = self.rates[self.steps.get(group["keys"][0], 0)]
        group["lr"] = scheduled * group["lr_ratio"]

    def _hold(self, group: dict[str, Any]) -> None:
        """Without a gradient no optimizer touches a tensor or its state, but some count steps per group, if only from
        their first one on."""
        for tensor in group["params"]:
            self._put_back.append(partial(setattr, tensor, "grad", tensor.grad))
            tensor.grad = None
        before = group.get("step", 0)
        self._put_back.append(lambda: group.update(step=before) if "step" in group else None)

    def _after(self, optimizer: Optimizer, args, kwargs) -> None:
        for put_back in self._put_back:
            put_back()
        self._put_back.clear()
        if self.paused:
            return
        written(self._tensors())
        for key in self.variant.active_keys() or ():  # also those that are on another pipeline stage
            self.steps[key] = self.steps.get(key, 0) + 1
        self.variant.advance(self.ranks)

    def detach(self) -> None:
        """Let the optimizer be; again, nothing happens."""
        for hook in self._hooks:
            hook.remove()
        if self.in_force:
            count_writes(self._tensors(), counted=False)
        self.in_force = False

    def state_dict(self) -> dict[str, Any]:
        """What a resumed run needs; JSON can hold it."""
        return {"rates": self.rates, "steps": self.steps, "variant": self.variant.state_dict()}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Go on from what ``state_dict`` gave."""
        self.rates, self.steps = list(state["rates"]), dict(state["steps"])
        self.variant.load_state_dict(state["variant"])
