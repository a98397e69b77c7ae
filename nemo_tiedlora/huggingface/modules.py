"""The linear layers of transformers' models, and which of Megatron's rows they are."""

from __future__ import annotations

from typing import NamedTuple


class Module(NamedTuple):
    """A linear layer of a transformers model.

    Args:
        name: below its transformer layer, such as ``self_attn.q_proj``.
        parts: the targets whose rows of Megatron's weight it has, one below the other; see ``model.targets.rows``.
    """

    name: str
    parts: tuple[str, ...]


class Modules(NamedTuple):
    """How models of a family call their linear layers.

    Args:
        layers: the list of transformer layers, such as ``model.layers``.
        linear: all linear layers in one of them.
        transposed: whether their weights are (in, out), as those of transformers' Conv1D are.
    """

    layers: str
    linear: tuple[Module, ...]
    transposed: bool = False


LLAMA = Modules(
    "model.layers",
    (
        Module("self_attn.q_proj", ("attention_q",)),
        Module("self_attn.k_proj", ("attention_k",)),
        Module("self_attn.v_proj", ("attention_v",)),
        Module("self_attn.o_proj", ("attention_dense",)),
        Module("mlp.gate_proj", ("mlp_gate",)),
        Module("mlp.up_proj", ("mlp_up",)),
        Module("mlp.down_proj", ("mlp_fc2",)),
    ),
)
