"""What stands in for the fused norms of Apex and Transformer Engine in megatron-core's local layers."""

from __future__ import annotations

import torch
from torch.nn import functional as F

from nemo_tiedlora.platform.patch import Restore, missing, patch


class ZeroCenteredLayerNorm(torch.nn.LayerNorm):
    """Layer norm whose weight is stored minus one (NeMo: `layernorm1p`)."""

    def reset_parameters(self):
        torch.nn.init.zeros_(self.weight)
        torch.nn.init.zeros_(self.bias)

    def forward(self, x):
        return F.layer_norm(x, self.normalized_shape, self.weight + 1, self.bias, self.eps)


class ZeroCenteredRMSNorm(torch.nn.RMSNorm):
    """RMS norm whose weight is stored minus one (Gemma). In float32: near one, half precision has three digits."""

    def reset_parameters(self):
        torch.nn.init.zeros_(self.weight)

    def forward(self, x):
        return F.rms_norm(x.float(), self.normalized_shape, self.weight.float() + 1, self.eps).type_as(x)


NORMS = {
    ("LayerNorm", False): torch.nn.LayerNorm,
    ("LayerNorm", True): ZeroCenteredLayerNorm,
    ("RMSNorm", False): torch.nn.RMSNorm,
    ("RMSNorm", True): ZeroCenteredRMSNorm,
}


def build_norm(cls, config, hidden_size, eps=1e-5, persist_layer_norm=False, zero_centered_gamma=False, **unused):
    """megatron-core's `WrappedTorchNorm.__new__` with the cases it refuses.

    `persist_layer_norm` and `memory_efficient_layer_norm` choose between kernels with one result: nothing to do.
    """
    norm = NORMS[config.normalization, config.layernorm_zero_centered_gamma](hidden_size, eps=eps)
    for parameter in norm.parameters():
        # Each rank normalises its own part of the sequence: the mark makes Megatron add the gradients up over ranks.
        parameter.sequence_parallel = config.sequence_parallel
    return norm


@patch(needed=missing("apex"))
def torch_norm(restore: Restore) -> None:
    """megatron-core's torch norm refuses sequence parallelism, zero-centered weights and persistent kernels."""
    from megatron.core.transformer.torch_norm import WrappedTorchNorm

    restore.set(WrappedTorchNorm, "__new__", staticmethod(build_norm))
