"""One layer's adapter as NeMo sees it: a module with a config dataclass, added to a Megatron linear layer.

Every scheme has a class and a config dataclass of its own here, ``TiedLoraAdapter`` and ``TiedLoraAdapterConfig`` for
``tied_lora`` and so on: NeMo finds them by import path and accepts adapters by class.
"""

import sys
from collections.abc import Collection
from dataclasses import dataclass, make_dataclass
from functools import cache
from typing import Any

import torch
from megatron.core.tensor_parallel import get_cuda_rng_tracker
from nemo.collections.common.parts.adapter_modules import AdapterModuleUtil
from nemo.core.classes.mixins import adapter_mixin_strategies
from nemo.core.classes.mixins.adapter_mixins import AdapterConfig
from torch import nn
from torch.nn import functional as F

from nemo_tiedlora.ops import apply
from nemo_tiedlora.parallel.cut import mark, tensor_ranks
from nemo_tiedlora.parallel.exchange import EXCHANGES
from nemo_tiedlora.parallel.synchronise import partial, shared_gradient
from nemo_tiedlora.parallel.weight import ShardedWeight
from nemo_tiedlora.variants import METHODS, Bank, Factors, FrozenWeight, Site


class FactorAdapter(nn.Module, AdapterModuleUtil):
    """Applies one layer's factors to that layer's output.

    It owns the tensors that no earlier layer owns; the bank it is bound to knows where the others live.

    Args:
        target: kind of linear layer.
        parallel: ``column`` or ``row``, as the layer is.
        dropout: on the adapter's input.
        settings: the scheme's settings, for the record that NeMo keeps of every adapter.
    """

    def __init__(
        self, target: str, parallel: str, dropout: float, settings: dict[str, Any], model_parallel_config=None, **_
    ):
        super().__init__()
        self.target, self.parallel, self.dropout = target, parallel, dropout
        self.sharded = tensor_ranks()[0] > 1
        self._shared: list[str] = []
        # NeMo switches this off, by name, while it generates.
        self.sequence_parallel = self.sharded and bool(getattr(model_parallel_config, "sequence_parallel", False))
        self.setup_adapter_strategy(adapter_mixin_strategies.ReturnResultAdapterStrategy())

    def bind(self, bank: Bank, site: Site, linear: nn.Module, rows: torch.Tensor | None, blocks: int) -> None:
        """Take this layer's place in the bank: create the tensors it is the first to need, in ``linear``'s dtype.

        Args:
            rows: the rows of a fused ``linear`` that the target addresses; None means all.
            blocks: how many matrices Megatron stacks in the target's weight and shards one by one.
        """
        # Not as submodules: a shared tensor must appear once in the model's parameters.
        object.__setattr__(self, "_bank", bank)
        object.__setattr__(self, "_linear", linear)
        self.site, self.blocks = site, blocks
        self.register_buffer("_rows", None if rows is None else rows.to(linear.weight.device), persistent=False)
        bank.adopt(self, site, self.frozen())
        for name, spec in bank.variant.tensors(site).items():
            if spec.trained and name in self._parameters:
                mark(self._parameters[name], spec, self.parallel)

    def frozen(self) -> FrozenWeight:
        """This rank's part of the layer's frozen weight."""
        if self.sharded:
            return ShardedWeight(self._linear.weight, self._rows, self.parallel, self.sequence_parallel, self.blocks)
        return FrozenWeight(self._linear.weight, self._rows)

    def share_gradients_of(self, partials: Collection[str]) -> None:
        """Of a tensor whose gradients are summed over the tensor ranks, a part that is whole on each counts once."""
        if self.sharded:
            self._shared = [
                name
                for name, spec in self._bank.variant.tensors(self.site).items()
                if spec.key in partials and not partial(spec, self.parallel, self.sequence_parallel)
            ]

    def factors(self) -> Factors:
        """This rank's part of the layer's A, B, scale and gain."""
        tensors = self._bank.tensors(self.site)
        for name in self._shared:
            tensors[name] = shared_gradient(tensors[name])
        return self._bank.variant.factors(self.site, tensors, self.frozen())

    def forward(self, output: torch.Tensor, x: torch.Tensor, bias: torch.Tensor | None = None) -> torch.Tensor:
        """``output`` (seq, batch, out) of the frozen layer for ``x`` (seq, batch, in), with the factors applied.

        Inside an expert both are (tokens, …), which may be none.

        Args:
            bias: what the frozen layer has added to ``output`` beside its product with ``x``: (out,).
        """
        A, B, scale, gain, u = self.factors()
        if self._rows is not None:
            out = self._linear.weight.shape[0]
            B = B.new_zeros(out, B.shape[1]).index_copy(0, self._rows, B)
            gain = None if gain is None else gain.new_ones(out).index_copy(0, self._rows, gain)
        # Around all experts Megatron gathers tokens and adds up outputs itself. It trains them under sequence
        # parallelism only, and the gradients of factors are as partial as there.
        alone = not self.sharded or self.site.routed
        exchange = None if alone else EXCHANGES[self.parallel, self.sequence_parallel]
        output = apply(output, self._dropped(x), A, B, scale, gain, u, bias, exchange)
        if self.training and self._bank.variant.observes:
            seen = output if self._rows is None else output[..., self._rows]
            self._bank.variant.observe(self.site, seen.transpose(0, 1))
        return output

    def _dropped(self, x: torch.Tensor) -> torch.Tensor:
        if not (self.dropout and self.training):
            return x
        if self.sharded and (self.parallel == "row" or (self.sequence_parallel and not self.site.routed)):
            with get_cuda_rng_tracker().fork():  # every rank has values of its own, and needs a mask of its own
                return F.dropout(x, self.dropout)
        return F.dropout(x, self.dropout)  # all ranks have the same values, and the same generator


@dataclass
class FactorAdapterConfig(AdapterConfig):
    """What NeMo's ``add_adapter`` needs to make a ``FactorAdapter``; ``_target_`` says of which scheme."""

    target: str
    parallel: str
    dropout: float
    settings: dict[str, Any]


@cache
def adapter_config(scheme: str) -> type[FactorAdapterConfig]:
    """The config dataclass of a scheme's adapters; it and the adapter class become names of this module."""
    module = sys.modules[__name__]
    name = "".join(word.title() for word in scheme.split("_")) + "Adapter"
    doc = f"A layer's adapter of scheme {scheme}."
    setattr(module, name, type(name, (FactorAdapter,), {"__doc__": doc, "__module__": __name__}))
    target = ("_target_", str, f"{__name__}.{name}")
    config = make_dataclass(f"{name}Config", [target], bases=(FactorAdapterConfig,), namespace={"__module__": __name__})
    setattr(module, config.__name__, config)
    return config


for _scheme in METHODS:
    adapter_config(_scheme)
