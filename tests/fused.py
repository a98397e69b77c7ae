"""What Megatron-core itself does with weights: takes fused ones apart, and gives each tensor rank its part."""

from types import SimpleNamespace
from unittest.mock import patch

import torch
from megatron.core.dist_checkpointing.mapping import ShardedTensor
from megatron.core.transformer import attention
from megatron.core.transformer.mlp import MLP, apply_swiglu_sharded_factory
from torch import Tensor


def queries_keys_values(weight: Tensor, heads: int, groups: int, head_dim: int) -> dict[str, Tensor]:
    """The rows of a fused QKV weight (out, in) by which attention makes its ``q``, ``k`` and ``v``, head by head."""
    layer = SimpleNamespace(
        linear_qkv=lambda hidden: (hidden.T[:, None], None),  # (in, 1, out): as activations of `in` tokens
        num_query_groups_per_partition=groups,
        num_attention_heads_per_partition=heads,
        hidden_size_per_attention_head=head_dim,
        q_layernorm=None,
        k_layernorm=None,
        config=SimpleNamespace(test_mode=False),
    )
    with patch.object(attention, "SplitAlongDim", None):  # Transformer Engine's, on a GPU
        parts = attention.SelfAttention.get_query_key_value_tensors(layer, weight)
    return {name: part.flatten(1).T for name, part in zip("qkv", parts, strict=True)}


def gate_up(weight: Tensor) -> dict[str, Tensor]:
    """The rows of a gated fc1 weight (out, in) that go through the activation, ``gate``, and those beside, ``up``."""
    found = {}

    def activation(x: Tensor) -> Tensor:
        found["gate"] = x.T
        return torch.ones_like(x)

    layer = SimpleNamespace(
        linear_fc1=lambda hidden: (hidden.T, None),
        linear_fc2=lambda hidden: (hidden, None),
        config=SimpleNamespace(bias_activation_fusion=False, gated_linear_unit=True, activation_func=activation),
        activation_func=activation,
    )
    return found | {"up": MLP.forward(layer, weight)[0].T}


def held(whole: Tensor, axis: int, rank: int, ranks: int, gated: bool = False) -> Tensor:
    """What Megatron's distributed checkpoints give to tensor rank ``rank`` of a tensor whose ``axis`` is cut.

    Args:
        gated: it is a fused gate and up projection's.
    """
    sizes = list(whole.shape)
    sizes[axis] //= ranks
    mine = whole.new_empty(sizes)
    sharded = ShardedTensor.from_rank_offsets("weight", mine, (axis, rank, ranks))
    for piece in apply_swiglu_sharded_factory(sharded, ()).build() if gated else [sharded]:
        piece.data.copy_(whole[piece.global_slice()])
    return mine
