"""What transformers' models call their modules, and which of Megatron's rows their linear layers are."""

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
    """How models of a family call their modules.

    Args:
        layers: the list of transformer layers, such as ``model.layers``.
        linear: all linear layers in one of them, in Megatron's order.
        norms: before attention and before the MLP, in one of them. last_norm: the one after all layers.
        words: the embedding of tokens. positions: that of learned positions, if any.
        transposed: whether the linear layers' weights are (in, out), as those of transformers' Conv1D are.
    """

    layers: str
    linear: tuple[Module, ...]
    norms: tuple[str, str]
    last_norm: str
    words: str
    positions: str | None = None
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
    norms=("input_layernorm", "post_attention_layernorm"),
    last_norm="model.norm",
    words="model.embed_tokens",
)
GPT2 = Modules(
    "transformer.h",
    (
        Module("attn.c_attn", ("attention_q", "attention_k", "attention_v")),
        Module("attn.c_proj", ("attention_dense",)),
        Module("mlp.c_fc", ("mlp_fc1",)),
        Module("mlp.c_proj", ("mlp_fc2",)),
    ),
    norms=("ln_1", "ln_2"),
    last_norm="transformer.ln_f",
    words="transformer.wte",
    positions="transformer.wpe",
    transposed=True,
)
