"""The forward pass of a Llama-like model in a page of PyTorch, in float64: what others are compared with."""

import torch
from torch import Tensor


def logits(weights: dict[str, Tensor], tokens: Tensor, config: dict) -> Tensor:
    """Scores (rows, length, vocabulary) of the next tokens after ``tokens`` (rows, length).

    Args:
        weights: under the names of a Megatron-core checkpoint, the layers of each kind stacked.
        config: NeMo's names for the sizes.
    """
    weights = {name.removeprefix("decoder."): weight.double() for name, weight in weights.items()}
    heads, groups, layers = config["num_attention_heads"], config["num_query_groups"], config["num_layers"]

    def norm(x: Tensor, scale: Tensor) -> Tensor:
        return x * (x.square().mean(-1, keepdim=True) + config["layernorm_epsilon"]).rsqrt() * scale

    x = weights["embedding.word_embeddings.weight"][tokens]
    for layer in range(layers):
        of = {name.removeprefix("layers."): w[layer] for name, w in weights.items() if name.startswith("layers.")}
        normed = norm(x, of["self_attention.linear_qkv.layer_norm_weight"])
        # Rows of the fused matrix: of one group after the other, its queries, its key and its value.
        fused = (normed @ of["self_attention.linear_qkv.weight"].T).unflatten(-1, (groups, heads // groups + 2, -1))
        queries = fused[..., :-2, :]
        keys, values = (fused[..., [at], :].expand_as(queries) for at in (-2, -1))
        queries, keys, values = (part.flatten(2, 3).transpose(1, 2) for part in (queries, keys, values))
        queries, keys = _rotated(queries), _rotated(keys)
        scores = queries @ keys.mT / queries.shape[-1] ** 0.5
        later = torch.ones(scores.shape[-2:], dtype=bool).triu(1)
        mixed = scores.masked_fill(later, -torch.inf).softmax(-1) @ values
        x = x + mixed.transpose(1, 2).flatten(2) @ of["self_attention.linear_proj.weight"].T
        gate, up = (norm(x, of["mlp.linear_fc1.layer_norm_weight"]) @ of["mlp.linear_fc1.weight"].T).chunk(2, -1)
        x = x + (torch.nn.functional.silu(gate) * up) @ of["mlp.linear_fc2.weight"].T
    return norm(x, weights["final_layernorm.weight"]) @ weights["output_layer.weight"].T


def _rotated(x: Tensor) -> Tensor:
    """Rotary positions for ``x`` (..., length, head size): pairs are an element of each half."""
    length, size = x.shape[-2:]
    frequencies = 10000.0 ** -(torch.arange(0, size, 2, dtype=torch.float64) / size)
    angles = torch.arange(length, dtype=torch.float64)[:, None] * frequencies
    first, second = x.chunk(2, -1)
    cos, sin = angles.cos(), angles.sin()
    return torch.cat([first * cos - second * sin, second * cos + first * sin], -1)
