"""What stands in for fused kernels that a configuration asks for and this machine does not have."""

from __future__ import annotations

import importlib
from functools import wraps

from nemo_tiedlora.platform.cuda import no_cuda
from nemo_tiedlora.platform.patch import Restore, missing, patch

# Switch in a Megatron configuration -> the extension modules whose presence makes it work. Without them the plain
# torch path gives the same result.
KERNELS = {
    "masked_softmax_fusion": missing("scaled_upper_triang_masked_softmax_cuda"),
    "gradient_accumulation_fusion": missing("fused_weight_gradient_mlp_cuda"),
    "apply_rope_fusion": lambda: missing("transformer_engine")() and missing("apex")(),
}

JIT_FUSED = (
    "megatron.core.fusions.fused_bias_dropout",
    "megatron.core.fusions.fused_bias_geglu",
    "megatron.core.fusions.fused_bias_gelu",
    "megatron.core.fusions.fused_bias_swiglu",
    "megatron.core.fusions.fused_cross_entropy",
    "megatron.core.transformer.utils",
)


@patch(needed=lambda: any(absent() for absent in KERNELS.values()))
def fused_kernels(restore: Restore) -> None:
    """A base model made on a GPU machine carries switches for kernels that come with Apex or Transformer Engine."""
    from megatron.core import ModelParallelConfig
    from megatron.core.transformer import TransformerConfig

    def without_missing_kernels(post_init):
        @wraps(post_init)
        def check(self):
            for switch, absent in KERNELS.items():
                if getattr(self, switch, False) and absent():
                    setattr(self, switch, False)
            post_init(self)

        return check

    for config in (ModelParallelConfig, TransformerConfig):
        restore.set(config, "__post_init__", without_missing_kernels(config.__post_init__))


@patch(needed=no_cuda)
def jit_fused_functions(restore: Restore) -> None:
    """megatron-core compiles its small fused functions with torch.compile at their first call.

    On a CPU that takes a C++ compiler, and a compilation per function and process. The functions themselves stay: a
    fused bias + GELU is the tanh approximation, so switching the fusion off would change results.
    """
    for module in map(importlib.import_module, JIT_FUSED):
        for name, value in list(vars(module).items()):
            if hasattr(value, "_torchdynamo_orig_callable"):
                restore.set(module, name, value._torchdynamo_orig_callable)
