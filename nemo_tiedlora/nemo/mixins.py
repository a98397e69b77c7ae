"""Megatron's linear layers with adapters.

The hook sits on the linear layer itself, not on the attention block around it: the block's own code, which changes
with every Megatron version, runs as it is, and all target modules share one way in.
"""

from importlib.util import find_spec

from megatron.core.tensor_parallel import ColumnParallelLinear, RowParallelLinear
from nemo.collections.nlp.modules.common.megatron.adapters.mcore_mixins import MCoreAdapterModuleMixin

from nemo_tiedlora.model.targets import Target
from nemo_tiedlora.nemo.adapter import adapter_config
from nemo_tiedlora.variants import METHODS


class AdaptedLinearMixin(MCoreAdapterModuleMixin):
    """Applies every enabled adapter to a linear layer's output.

    Comes second among a class's bases: Python only lets a layer change its class to one of the same memory layout,
    which the first base decides.
    """

    def mcore_register_adapters(self):
        self.set_accepted_adapter_types([adapter_config(scheme)._target_ for scheme in METHODS])

    def add_adapter(self, name, cfg, **kwargs):
        super().add_adapter(name, cfg, **kwargs)
        self._enabled = self.get_enabled_adapters()

    def set_enabled_adapters(self, name=None, enabled=True):
        super().set_enabled_adapters(name, enabled)
        self._enabled = self.get_enabled_adapters()  # once per change: reading it from the config is slow

    def adapted(self, output, x, returned_bias):
        """``output`` of the frozen layer for its input ``x``, with every enabled adapter applied.

        Args:
            returned_bias: what the layer leaves to its caller to add; None if it has added its bias.
        """
        bias = self.bias if returned_bias is None and self.bias is not None and self.bias.numel() else None
        for name in self._enabled:
            output = self.adapter_layer[name](output, x, bias)
        return output


class AdaptedColumnParallelLinear(ColumnParallelLinear, AdaptedLinearMixin):
    """Megatron's local-spec QKV and fc1 projections."""

    def forward(self, input_, *args, **kwargs):
        output, bias = super().forward(input_, *args, **kwargs)
        return self.adapted(output, input_, bias), bias


class AdaptedRowParallelLinear(RowParallelLinear, AdaptedLinearMixin):
    """Megatron's local-spec output and fc2 projections."""

    def forward(self, input_):
        output, bias = super().forward(input_)
        return self.adapted(output, input_, bias), bias


LOCAL = {"column": AdaptedColumnParallelLinear, "row": AdaptedRowParallelLinear}
TRANSFORMER_ENGINE = {}

# Without Transformer Engine megatron-core still exports these names, as mocks.
if find_spec("transformer_engine"):
    from megatron.core.extensions.transformer_engine import (
        TEColumnParallelLinear,
        TELayerNormColumnParallelLinear,
        TERowParallelLinear,
    )

    class AdaptedTELayerNormColumnParallelLinear(TELayerNormColumnParallelLinear, AdaptedLinearMixin):
        """Transformer Engine's fused norm + projection: the adapter needs the normalised input, which it returns."""

        def mcore_register_adapters(self):
            super().mcore_register_adapters()
            self.return_layernorm_output = True

        def forward(self, x, *args, **kwargs):
            (output, normed), bias = super().forward(x, *args, **kwargs)
            return self.adapted(output, normed, bias), bias

    class AdaptedTERowParallelLinear(TERowParallelLinear, AdaptedLinearMixin):
        """Transformer Engine's output and fc2 projections."""

        def forward(self, x, *args, **kwargs):
            output, bias = super().forward(x, *args, **kwargs)
            return self.adapted(output, x, bias), bias

    class AdaptedTEColumnParallelLinear(TEColumnParallelLinear, AdaptedLinearMixin):
        """Transformer Engine's fc1 projection of an expert, before which all experts share one norm."""

        def forward(self, x, *args, **kwargs):
            output, bias = super().forward(x, *args, **kwargs)
            return self.adapted(output, x, bias), bias

    TRANSFORMER_ENGINE = {
        "column": AdaptedTELayerNormColumnParallelLinear,
        "row": AdaptedTERowParallelLinear,
        "expert's column": AdaptedTEColumnParallelLinear,
    }


def mixin(target: Target, transformer_engine: bool) -> type[AdaptedLinearMixin]:
    """The class of a target's linear layers once they have adapters."""
    classes = TRANSFORMER_ENGINE if transformer_engine and TRANSFORMER_ENGINE else LOCAL
    own = target.parallel if target.expert is None else f"expert's {target.parallel}"
    return classes.get(own, classes[target.parallel])
