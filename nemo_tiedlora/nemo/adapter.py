"""One layer's adapter as NeMo sees it: a module with a config dataclass, added to a Megatron linear layer.

Every scheme has a class and a config dataclass of its own here, ``TiedLoraAdapter`` and ``TiedLoraAdapterConfig`` for
``tied_lora`` and so on: NeMo finds them by import path and accepts adapters by class.
"""

import sys
from dataclasses import dataclass, make_dataclass
from typing import Any

import torch
from megatron.core import parallel_state
from nemo.collections.common.parts.adapter_modules import AdapterModuleUtil
from nemo.core.classes.mixins import adapter_mixin_strategies
from nemo.core.classes.mixins.adapter_mixins import AdapterConfig
from torch import nn
from torch.nn import functional as F

from nemo_tiedlora.ops import apply
from nemo_tiedlora.parallel.cut import SHARDED_AXIS, mark, sum_over_tensor_ranks
from nemo_tiedlora.variants import SCHEMES, Bank, Factors, FrozenWeight, Site


class FactorAdapter(nn.Module, AdapterModuleUtil):
    """Applies one layer's factors to that layer's output.

    It owns the tensors that no earlier layer owns; the bank it is bound to knows where the others live.

    Args:
        target: kind of target module.
        parallel: ``column`` or ``row``, as the layer is.
        dropout: on the adapter's input.
        settings: the scheme's settings, for the record that NeMo keeps of every adapter.
    """

    def __init__(self, target: str, parallel: str, dropout: float, settings: dict[str, Any], **_):
        super().__init__()
        self.target, self.parallel, self.dropout = target, parallel, dropout
        self.setup_adapter_strategy(adapter_mixin_strategies.ReturnResultAdapterStrategy())

    def bind(self, bank: Bank, site: Site, linear: nn.Module, rows: torch.Tensor | None) -> None:
        """Take this layer's place in the bank: create the tensors it is the first to need, in ``linear``'s dtype.

        Args:
            rows: the rows of a fused ``linear`` that the target addresses; None means all.
        """
        self.register_buffer("_rows", None if rows is None else rows.to(linear.weight.device), persistent=False)
        # Not as submodules: a shared tensor must appear once in the model's parameters.
        object.__setattr__(self, "_bank", bank)
        object.__setattr__(self, "_linear", linear)
        bank.adopt(self, site, self.frozen())
        self.site = site
        for name, spec in bank.variant.tensors(site).items():
            if spec.trained and name in self._parameters:
                mark(self._parameters[name], spec, SHARDED_AXIS[self.parallel])
        sharded = self.parallel == "column" and parallel_state.get_tensor_model_parallel_world_size() > 1
        self._reduce_grad = sum_over_tensor_ranks if sharded else None

    def frozen(self) -> FrozenWeight:
        """The W (out, in) that it adapts: of this rank, and of a fused layer the target's rows only."""
        return FrozenWeight(self._linear.weight, self._rows)

    def factors(self) -> Factors:
        """What it does to ``frozen()``, on this rank."""
        return self._bank.factors(self.site, self.frozen())

    def forward(self, output: torch.Tensor, x: torch.Tensor, bias: torch.Tensor | None = None) -> torch.Tensor:
        """``output`` (seq, batch, out) of the frozen layer for ``x`` (seq, batch, in), with the factors applied.

        Args:
            bias: what the frozen layer has added to ``output`` beside its product with ``x``: (out,).
        """
        A, B, scale, gain = self.factors()
        if self._rows is not None:
            whole = self._linear.weight.shape[0]
            B = B.new_zeros(whole, B.shape[1]).index_copy(0, self._rows, B)
            gain = None if gain is None else gain.new_ones(whole).index_copy(0, self._rows, gain)
        x = F.dropout(x, self.dropout, self.training) if self.dropout else x
        output = apply(output, x, A, B, scale, gain, bias, self._reduce_grad)
        if self.training and self._bank.variant.observes:
            seen = output if self._rows is None else output[..., self._rows]
            self._bank.variant.observe(self.site, seen.transpose(0, 1))
        return output


@dataclass
class FactorAdapterConfig(AdapterConfig):
    """What NeMo's ``add_adapter`` needs to make a ``FactorAdapter``; ``_target_`` says of which scheme."""

    target: str
    parallel: str
    dropout: float
    settings: dict[str, Any]


def _config_class(scheme: str) -> type[FactorAdapterConfig]:
    """The scheme's config dataclass; both its classes become names of this module."""
    module = sys.modules[__name__]
    name = "".join(word.title() for word in scheme.split("_")) + "Adapter"
    doc = f"A layer's adapter of scheme {scheme}."
    setattr(module, name, type(name, (FactorAdapter,), {"__doc__": doc, "__module__": __name__}))
    target = ("_target_", str, f"{__name__}.{name}")
    config = make_dataclass(f"{name}Config", [target], bases=(FactorAdapterConfig,), namespace={"__module__": __name__})
    setattr(module, config.__name__, config)
    return config


#: Scheme → the config dataclass of its adapters.
ADAPTER_CONFIGS = {scheme: _config_class(scheme) for scheme in SCHEMES}
