"""The adapters on one model: which of them are active, in what mix, and how that goes into the weights.

A mix of adapters is ``W + Σ w_i (W_i' − W)``: each adapter's change of the frozen W, as it would be alone, times its
weight. So CondLoRA and DoRA, which read W, mean the same beside others as they do alone.
"""

from __future__ import annotations

import math
import re
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import TYPE_CHECKING

from torch import nn

from nemo_tiedlora.attach.placed import Placed, write
from nemo_tiedlora.errors import UsageError, closest

if TYPE_CHECKING:
    from nemo_tiedlora.attach.model import Attached


class Adapters(Mapping[str, "Attached"]):
    """The adapters on a model, by name.

    Only active ones change the model's outputs and want gradients; one that is attached becomes the only active one.

    Args:
        model: everything in it is frozen, once the first adapter joins.

    Attributes:
        active: the weight of each active adapter, by name.
        merged: the weights that were merged; None: nothing is.
    """

    def __init__(self, model: nn.Module):
        self.model = model
        self.active: dict[str, float] = {}
        self.merged: dict[str, float] | None = None
        self._on: dict[str, Attached] = {}
        self._wanted: list[nn.Parameter] = []

    def __getitem__(self, name: str) -> Attached:
        return self._on[name]

    def __iter__(self) -> Iterator[str]:
        return iter(self._on)

    def __len__(self) -> int:
        return len(self._on)

    def set_adapter(self, which: str | Mapping[str, float]) -> None:
        """Make one adapter the only active one, or several, each with its weight; the others' gradients are dropped.

        Args:
            which: a name, or the weight of each that is to be active.

        Raises:
            UsageError: no such adapter; a weight that is no finite number; or several that train the same module whole.
                Then all is as it was.
        """
        self._set(self._weights(which))

    def _set(self, weights: dict[str, float]) -> None:
        for name, adapter in self._on.items():
            if name not in weights:
                adapter._switch(False)
        for name, adapter in self._on.items():
            adapter._switch(name in weights)
            adapter._want(name in weights)
            for placed in adapter.placed:
                placed.alone, placed.share = len(weights) == 1, weights.get(name, 1.0)
        self.active = weights

    def _weights(self, which: str | Mapping[str, float]) -> dict[str, float]:
        weights = {which: 1.0} if isinstance(which, str) else dict(which)
        if not weights:
            raise UsageError("adapter", which, "name one at least; disabled() is the model without any")
        heads: dict[str, str] = {}
        for name, weight in weights.items():
            if name not in self._on:
                raise UsageError("adapter", name, f"is not on the model; {closest(name, self._on)}")
            if isinstance(weight, bool) or not isinstance(weight, int | float) or not math.isfinite(weight):
                raise UsageError("adapter", {name: weight}, "its weight must be a finite number")
            for head in self._on[name].whole_modules():
                if head in heads:
                    way_out = f"trains {head} whole, as {heads[head]} does, and a mix has one; name one of them"
                    raise UsageError("adapter", name, f"{way_out}, or attach with modules_to_save=[]")
                heads[head] = name
        return weights

    @contextmanager
    def disabled(self, only: Attached | None = None) -> Iterator[None]:
        """The model without its adapters inside a ``with`` block.

        Args:
            only: without this one; None: without all.
        """
        off = [one for one in self._on.values() if one.placed[0].enabled and only in (None, one)]
        for adapter in off:
            adapter._switch(False)
        try:
            yield
        finally:
            for adapter in off:
                if self.get(adapter.name) is adapter and adapter.name in self.active:  # it may have left within
                    adapter._switch(True)

    def merge(self, which: str | Mapping[str, float] | None = None) -> nn.Module:
        """Write a mix of adapters into the frozen weights, and take all adapters off.

        Args:
            which: a name, or weights by name; None: what is active.

        Returns:
            The model, as it was before the first adapter but for its weights and the modules that the merged ones train
            whole.

        Raises:
            UsageError: a tensor has NaN or infinity in it, a weight of the model is quantised or sharded, or there is
                nothing to merge. Then all is as it was.
        """
        if self.merged is not None or not self._on:
            raise UsageError("model", type(self.model).__name__, "there is no adapter on it")
        weights = self._weights(self.active if which is None else which)
        for name in weights:
            for key, tensor in self._on[name].named_tensors().items():
                if not tensor.isfinite().all():
                    raise UsageError("adapter", key, "has NaN or infinity in it, which would be in the weights")
        write([(placed, weight) for name, weight in weights.items() for placed in self._on[name].placed])
        self._set(weights)  # so that what they train whole is what the model has
        for adapter in self._on.values():
            adapter._take_off()
        self.merged = weights
        self._thaw()
        for name in weights:
            self._on[name]._keep_whole_modules()
        return self.model

    def unmerge(self) -> nn.Module:
        """Take the mix out of the weights again after ``merge``, to within rounding, and put all adapters back.

        Raises:
            UsageError: nothing is merged, a change depends on the weights that it changed, or another adapter is on the
                model.
        """
        if self.merged is None:
            raise UsageError("model", type(self.model).__name__, "nothing is merged into it")
        for name in self.merged:
            variant = self._on[name].variant
            if why := variant.final_at_merge():
                raise UsageError("adapter", variant.config.scheme, f"cannot be taken out: {why}; load the model again")
        if others := adapters_on(self.model):
            raise UsageError("adapter", next(iter(others)), "was attached after merging; detach() it first")
        write([(placed, -weight) for name, weight in self.merged.items() for placed in self._on[name].placed])
        self.merged = None
        self._freeze()
        for adapter in self._on.values():
            adapter._put()
        self._set(self.active)
        return self.model

    def _join(self, adapter: Attached) -> None:
        """Put an adapter on, as the only active one."""
        if not self._on:
            self._freeze()
        self._on[adapter.name] = adapter
        adapter._put()
        self._set({adapter.name: 1.0})

    def _leave(self, adapter: Attached) -> None:
        """Take one off; the others stay as they are, and the last one leaves the model as it was before the first."""
        adapter._switch(False)
        adapter._take_off()
        del self._on[adapter.name]
        self._set({name: weight for name, weight in self.active.items() if name != adapter.name})
        if not self._on:
            self._thaw()

    def _freeze(self) -> None:
        self._wanted = [parameter for parameter in self.model.parameters() if parameter.requires_grad]
        self.model.requires_grad_(False)

    def _thaw(self) -> None:
        self.model.requires_grad_(False)
        for parameter in self._wanted:
            parameter.requires_grad_(True)


def adapters_on(model: nn.Module) -> Adapters | None:
    """The adapters on a model, or None."""
    return next((module.adapters for module in model.modules() if isinstance(module, Placed)), None)


def joined(model: nn.Module, name: str) -> Adapters:
    """The adapters that one more of this name joins on a model.

    Raises:
        UsageError: the name cannot be, or is another's; or a part of the model, or more than it, has an adapter.
    """
    if not isinstance(name, str) or not re.fullmatch(r"[A-Za-z0-9_]+", name):
        raise UsageError("name", name, "write letters, digits and underscores")
    adapters = adapters_on(model) or Adapters(model)
    if adapters.model is not model:
        way_out = f"an adapter is on a {type(adapters.model).__name__} that has modules of it; attach to that"
        raise UsageError("model", type(model).__name__, way_out)
    if name in adapters:
        way_out = "the model has an adapter of this name already; give another name, or merge() or detach() that first"
        raise UsageError("name", name, way_out)
    return adapters
