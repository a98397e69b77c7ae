"""What NeMo computes for a base's config, so that two configs that say the same in other words are equal."""

from __future__ import annotations

from typing import Any

from nemo_tiedlora.huggingface.families import TANH
from nemo_tiedlora.model.data import ModelConfig

#: Fields that decide what is computed, and what NeMo takes where a config says nothing.
FIELDS: dict[str, Any] = {
    "num_layers": None, "hidden_size": None, "ffn_hidden_size": None, "num_attention_heads": None,
    "mcore_gpt": False, "layernorm_epsilon": 1e-5, "bias": True, "qk_layernorm": False,
    "position_embedding_type": "learned_absolute", "share_embeddings_and_output_weights": True,
    "apply_embedding_scaling": False,
    # Of models that are none of transformers' that can be written.
    "name": "", "num_moe_experts": None, "multi_latent_attention": False, "mcore_customization_config": {},
    "mtp_num_layers": None, "hyena": None, "drop_layers": None, "softmax_scale": None, "window_size": None,
}  # fmt: skip
LLAMA3 = {"scale_factor": 8, "low_freq_factor": 1, "high_freq_factor": 4, "old_context_len": 8192}
FUNCTIONS = {"swiglu": "silu", "geglu": "gelu", "reglu": "relu"}


def meaning(config: ModelConfig) -> dict[str, Any]:
    """By field, the value that counts."""
    said = {name: value for name, value in config.items() if value is not None}
    found = {name: said.get(name, default) for name, default in FIELDS.items()}
    if found["name"] == "te_gpt":  # what NeMo takes for none
        found["name"] = ""
    heads = said.get("num_attention_heads")
    found["num_query_groups"] = said.get("num_query_groups", heads)
    found["kv_channels"] = said.get("kv_channels") or said["hidden_size"] // heads
    found["qkv_bias"] = bool(found["bias"] or said.get("qkv_bias"))
    found["normalization"] = str(said.get("normalization", "layernorm")).lower()
    found["layernorm_zero_centered_gamma"] = bool(said.get("layernorm_zero_centered_gamma"))
    found["activation"] = _activation(said)
    if found["position_embedding_type"] == "rope":
        found["rotary_percentage"] = said.get("rotary_percentage", 1.0)
        found["rotary_base"] = said.get("rotary_base", 10000)
        found["rotary_interleaved"] = said.get("rotary_interleaved", False)
        found["seq_len_interpolation_factor"] = said.get("seq_len_interpolation_factor")
        scaled = bool(said.get("scale_positional_embedding"))
        found["scale_positional_embedding"] = scaled
        found |= {name: said.get(name, default) if scaled else None for name, default in LLAMA3.items()}
    return found


def _activation(said: dict[str, Any]) -> str:
    """As transformers calls it, and whether it is multiplied by a gate."""
    name = str(said.get("activation", "gelu")).removeprefix("fast-")
    gated, function = name.endswith("glu"), FUNCTIONS.get(name, name)
    # Megatron-core's function that also adds the bias takes tanh.
    if said.get("openai_gelu") or (function == "gelu" and said.get("bias_activation_fusion", True)):
        function = TANH
    return f"{'gated ' if gated else ''}{function}"
