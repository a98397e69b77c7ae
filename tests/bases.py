"""Toy bases of other forms than the Llama-like and the GPT-2B-like one: biases, norms of heads, positions, experts."""

from __future__ import annotations

from pathlib import Path

import toy

#: Biases everywhere, learned positions, LayerNorm, an activation without a gate, tied embeddings.
GPT2 = dict(
    normalization="layernorm",
    bias=True,
    activation="gelu",
    position_embedding_type="learned_absolute",
    rotary_percentage=0.0,
    share_embeddings_and_output_weights=True,
)
#: Norms of every head's queries and keys, biases of q, k and v, and heads wider than the model's width says.
HEADS = dict(qk_layernorm=True, qkv_bias=True, kv_channels=16)
#: Experts in the place of every MLP, of which each token takes two; the loss has a part that spreads tokens over them.
EXPERTS = dict(num_moe_experts=4, moe_router_topk=2, moe_grouped_gemm=False, moe_aux_loss_coeff=0.01)
#: Besides, one that all tokens take.
SHARED_EXPERT = EXPERTS | dict(moe_shared_expert_intermediate_size=48, qk_layernorm=True)

#: By name: whose config it is like, and what is another.
BASES = {
    "gpt2": (toy.gpt_config, GPT2),
    "heads": (toy.llama_config, HEADS),
    "experts": (toy.llama_config, EXPERTS),
    "shared expert": (toy.llama_config, SHARED_EXPERT),
}


def save(name: str, tokenizer: Path, folder: Path, **overrides) -> Path:
    """Save a random base in ``folder`` as a `.nemo`; no bias or norm is as it is initialised, where it says nothing."""
    import torch
    from nemo.collections.nlp.models.language_modeling.megatron_gpt_model import MegatronGPTModel

    make, changes = BASES[name]
    config = make(tokenizer, **(changes | overrides))
    model = MegatronGPTModel(config, toy.trainer(config))
    torch.manual_seed(0)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.dim() == 1:
                parameter.add_(0.2 * torch.randn_like(parameter))
    path = folder / f"{name.replace(' ', '-')}.nemo"
    model.save_to(str(path))
    return path
