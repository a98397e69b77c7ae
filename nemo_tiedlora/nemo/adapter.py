"""One layer's adapter as NeMo sees it: a module with a config dataclass, added to a Megatron linear layer."""

from dataclasses import dataclass, field
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
from nemo_tiedlora.variants import Bank, FrozenWeight, Site


class FactorAdapter(nn.Module, AdapterModuleUtil):
    """Adds one layer's factors to that layer's output.

    It owns the tensors that no earlier layer owns; the bank it is bound to knows where the others live.

    Args:
        scheme: the method's name, as in ``model.peft.peft_scheme``.
        target: kind of target module.
        parallel: ``column`` or ``row``, as the layer is.
        dropout: on the adapter's input.
        settings: the method's settings, for the record that NeMo keeps of every adapter.
    """

    def __init__(self, scheme: str, target: str, parallel: str, dropout: float, settings: dict[str, Any], **_):
        super().__init__()
        self.scheme, self.target, self.parallel, self.dropout = scheme, target, parallel, dropout
        self.setup_adapter_strategy(adapter_mixin_strategies.ReturnResultAdapterStrategy())

    def bind(self, bank: Bank, site: Site, linear: nn.Module, rows: torch.Tensor | None) -> None:
        """Take this layer's place in the bank: create the tensors it is the first to need, in ``linear``'s dtype.

        Args:
            rows: the rows of a fused ``linear`` that the target addresses; None means all.
        """
        bank.adopt(self, site, device=linear.weight.device, dtype=linear.weight.dtype)
        # Not as submodules: a shared tensor must appear once in the model's parameters.
        object.__setattr__(self, "_bank", bank)
        object.__setattr__(self, "_linear", linear)
        self._site = site
        self.register_buffer("_rows", None if rows is None else rows.to(linear.weight.device), persistent=False)
        for name, spec in bank.variant.tensors(site).items():
            if spec.trained and name in self._parameters:
                mark(self._parameters[name], spec, SHARDED_AXIS[self.parallel])
        sharded = self.parallel == "column" and parallel_state.get_tensor_model_parallel_world_size() > 1
        self._reduce_grad = sum_over_tensor_ranks if sharded else None

    def forward(self, output: torch.Tensor, x: torch.Tensor) -> torch.Tensor:
        """``output`` (seq, batch, out) of the frozen layer for ``x`` (seq, batch, in), with the factors applied."""
        weight = self._linear.weight
        A, B, scale = self._bank.factors(self._site, FrozenWeight(weight, self._rows))
        if self._rows is not None:
            B = B.new_zeros(weight.shape[0], B.shape[1]).index_copy(0, self._rows, B)
        x = F.dropout(x, self.dropout, self.training) if self.dropout else x
        return apply(output, x, A, B, scale, reduce_grad=self._reduce_grad)


@dataclass
class FactorAdapterConfig(AdapterConfig):
    """What NeMo's ``add_adapter`` needs to make a ``FactorAdapter``."""

    scheme: str
    target: str
    parallel: str
    dropout: float
    settings: dict[str, Any] = field(default_factory=dict)
    _target_: str = f"{FactorAdapter.__module__}.{FactorAdapter.__name__}"
