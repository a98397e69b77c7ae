"""The parallel adapter, a baseline: ``MLP(x) + W_up f(W_down x)``, the bottleneck beside the feed-forward block.

He et al., arXiv:2110.04366, section 3; as LLM-Adapters (arXiv:2304.01933) places it. NeMo's ``adapter`` scheme puts its
bottlenecks behind the blocks whatever ``adapter_tuning.type`` says; this one takes the same settings.
"""

from megatron.core.transformer.mlp import MLP
from nemo.collections.nlp.modules.common.megatron.adapters.mcore_mixins import MCoreAdapterModuleMixin
from nemo.collections.nlp.modules.common.megatron.adapters.parallel_adapters import (
    AdapterName,
    ParallelLinearAdapterConfig,
)
from nemo.collections.nlp.parts.peft_config import CanonicalAdaptersPEFTConfig
from omegaconf import DictConfig

from nemo_tiedlora.errors import UsageError

NAME = AdapterName.POST_ATTN_ADAPTER


class ParallelMLP(MLP, MCoreAdapterModuleMixin):
    """A feed-forward block with a bottleneck beside it."""

    def mcore_register_adapters(self):
        """As NeMo asks of every mixin."""
        self.set_accepted_adapter_types([ParallelLinearAdapterConfig._target_])

    def forward(self, hidden_states, *args, **kwargs):
        """(sequence, batch, hidden) → the block's output and bias, the adapter's added to the output."""
        output, bias = super().forward(hidden_states, *args, **kwargs)
        adapter = self.get_adapter_module(NAME) if self.is_adapter_available() else None
        if adapter and self.adapter_cfg[NAME]["enabled"]:
            output = output + adapter(hidden_states)
        return output, bias


class ParallelAdapterPEFTConfig(CanonicalAdaptersPEFTConfig):
    """``adapter_tuning``'s settings for one bottleneck per layer.

    Raises:
        UsageError: ``weight_tying``, which needs NeMo's two bottlenecks per layer.
    """

    def __init__(self, cfg: DictConfig):
        if cfg.peft.adapter_tuning.weight_tying:
            raise UsageError("adapter_tuning.weight_tying", True, "not with parallel_adapter; set it to false")
        super().__init__(cfg)
        self.name_key_to_cfg = {NAME: self.name_key_to_cfg[NAME]}
        self.name_key_to_mcore_mixins = {NAME: [("mlp", ParallelMLP)]}
