"""Which models can be taken over, their fields in NeMo's words, and the fields that would make other models of them."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from nemo_tiedlora.embedded.base import MODEL, TARGET
from nemo_tiedlora.errors import UsageError
from nemo_tiedlora.huggingface.modules import GPT2, LLAMA, Modules
from nemo_tiedlora.model.config import MOST_BYTES, MOST_LAYERS, MOST_SIZE

CONFIG = "config.json"


#: Fields that are read here, of all families, of those with rotary positions, and of GPT-2.
_ALL = {"architectures", "model_type", "vocab_size", "tie_word_embeddings", "bos_token_id", "eos_token_id"}
_ROTARY = {
    "num_hidden_layers", "hidden_size", "intermediate_size", "num_attention_heads", "num_key_value_heads", "head_dim",
    "max_position_embeddings", "rms_norm_eps", "rope_theta", "rope_scaling", "rope_parameters", "sliding_window",
    "use_sliding_window", "layer_types",
}  # fmt: skip
_LEARNED = {"n_layer", "n_embd", "n_inner", "n_head", "n_positions", "layer_norm_epsilon", "activation_function"}
#: Fields that may be there with these values: with another the model is one that these layers do not compute.
_SILU: dict[str, tuple[Any, ...]] = {"hidden_act": ("silu", "swish"), "partial_rotary_factor": (1, 1.0)}
TANH = "gelu_pytorch_tanh"
_TANH = {"hidden_act": (TANH,), "hidden_activation": (TANH,), "partial_rotary_factor": (1, 1.0)}
_PLAIN_ATTENTION = {
    "scale_attn_weights": (True,),
    "scale_attn_by_inverse_layer_idx": (False,),
    "reorder_and_upcast_attn": (False,),
}
#: What GPT-2's feed-forward layers compute, and whether NeMo's ``gelu`` is the one with tanh.
ACTIVATIONS = {"gelu_new": True, TANH: True, "gelu": False}


@dataclass(frozen=True)
class Family:
    """Models of one class of transformers.

    Args:
        models: what people call them.
        kind: their ``model_type``.
        nemo: what NeMo's config says of all of them, besides what it says of every Llama.
        defaults: what transformers takes where the config says nothing, and other families do not.
        only: fields that may be there with one of these values.
        modules: what they call their modules.
    """

    models: str
    kind: str
    nemo: dict[str, Any] = field(default_factory=dict)
    defaults: dict[str, Any] = field(default_factory=dict)
    only: dict[str, tuple[Any, ...]] = field(default_factory=lambda: _SILU)
    modules: Modules = LLAMA


#: By class, as in ``architectures``.
FAMILIES = {
    "LlamaForCausalLM": Family("Llama 1 to 3.x, SmolLM 1 and 2", "llama"),
    "MistralForCausalLM": Family(
        "Mistral without a sliding window", "mistral", defaults={"num_key_value_heads": 8, "sliding_window": 4096}
    ),
    "Qwen2ForCausalLM": Family(
        "Qwen2, Qwen2.5", "qwen2", nemo={"qkv_bias": True}, defaults={"num_key_value_heads": 32}
    ),
    "Qwen3ForCausalLM": Family(
        "Qwen3", "qwen3", nemo={"qk_layernorm": True}, defaults={"num_key_value_heads": 32, "head_dim": 128}
    ),
    "GemmaForCausalLM": Family(
        "Gemma 1", "gemma",
        # Both keep a norm's weight minus one.
        nemo={"layernorm_zero_centered_gamma": True, "apply_embedding_scaling": True, "activation": "fast-geglu",
              "openai_gelu": True},
        defaults={"num_key_value_heads": 16, "head_dim": 256, "tie_word_embeddings": True},
        only=_TANH,
    ),
    "GPT2LMHeadModel": Family(
        "GPT-2", "gpt2",
        nemo={"normalization": "layernorm", "bias": True, "position_embedding_type": "learned_absolute",
              "activation": "gelu"},
        defaults={"tie_word_embeddings": True},
        only=_PLAIN_ATTENTION,
        modules=GPT2,
    ),
}  # fmt: skip
SUPPORTED = "; ".join(f"{family.models} ({name})" for name, family in FAMILIES.items())

#: Fields that decide nothing about what a model computes from a text: how it was made and kept, how it is trained from
#: its first weights on, how text is drawn from it.
_OTHER = {
    "_name_or_path", "_model_name_or_path", "_flash_attn_2_enabled", "finetuning_task",
    "transformers_version", "torch_dtype", "dtype", "use_cache", "pad_token_id", "unk_token_id",
    "initializer_range", "attention_dropout", "hidden_dropout", "pretraining_tp", "max_window_layers",
    "is_llama_config", "transformers.js_config", "unsloth_version", "unsloth_fixed", "_attn_implementation_autoset",
    "return_dict", "id2label", "label2id", "task_specific_params", "tokenizer_class", "prefix", "problem_type",
    "max_length", "min_length", "do_sample", "early_stopping", "num_beams", "num_beam_groups", "diversity_penalty",
    "temperature", "top_k", "top_p", "typical_p", "repetition_penalty", "length_penalty", "no_repeat_ngram_size",
    "encoder_no_repeat_ngram_size", "bad_words_ids", "num_return_sequences", "chunk_size_feed_forward",
    "output_scores", "return_dict_in_generate", "remove_invalid_values", "suppress_tokens", "begin_suppress_tokens",
    "forced_bos_token_id", "forced_eos_token_id", "exponential_decay_length_penalty", "sep_token_id",
    "attn_pdrop", "embd_pdrop", "resid_pdrop", "n_ctx", "summary_type", "summary_use_proj", "summary_activation",
    "summary_first_dropout", "summary_proj_to_labels",
}  # fmt: skip


def read_config(folder: Path, name: str = CONFIG, most: int = MOST_BYTES, field: str = "model") -> dict[str, Any]:
    """A JSON file of settings, of at most ``most`` bytes, in a model's folder; ``field`` is what messages call it.

    Raises:
        UsageError: it is not there, or is none.
    """
    path = folder / name
    try:
        if path.stat().st_size > most:
            raise UsageError(field, str(path), f"larger than it can be: more than {most:,} bytes")
        content = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise UsageError(field, str(folder), f"there is no {name} in it; name the folder that has it") from None
    except (ValueError, RecursionError, OSError) as error:
        if isinstance(error, UsageError):
            raise
        raise UsageError(field, str(path), f"not readable as JSON ({type(error).__name__})") from None
    if not isinstance(content, dict):
        raise UsageError(field, str(path), "not a list of settings with names")
    return content


def family_of(config: dict[str, Any]) -> Family:
    """The family of a model's config.

    Raises:
        UsageError: it is of another one.
    """
    named = config.get("architectures")
    name = named[0] if isinstance(named, list) and len(named) == 1 else None
    if name not in FAMILIES:
        raise UsageError("architectures", named, f"in {CONFIG}; what can be taken over: {SUPPORTED}")
    kind = FAMILIES[name].kind
    if config.get("model_type", kind) != kind:
        raise UsageError("model_type", config["model_type"], f"in {CONFIG}; {name} is of type {kind}")
    return FAMILIES[name]


def model_config(config: dict[str, Any]) -> dict[str, Any]:
    """NeMo's config of the model; its tokenizer and the padding of its vocabulary are not in it.

    Args:
        config: the content of ``config.json``.

    Raises:
        UsageError: an unknown class, or a field with a value that these layers do not compute, by its name.
    """
    family = family_of(config)
    given = {name: value for name, value in config.items() if value is not None}
    _check_known(family, given)
    _check_windows(family, config, given)
    values = family.defaults | given
    tied = values.get("tie_word_embeddings", False)
    if type(tied) is not bool:
        raise UsageError("tie_word_embeddings", tied, f"in {CONFIG}; must be true or false")
    own = _learned(values) if family.modules.positions else _rotary(values)
    length = own["encoder_seq_length"]
    return {
        **MODEL,
        **family.nemo,
        **own,
        "max_position_embeddings": length,
        "share_embeddings_and_output_weights": tied,
        "data": {**MODEL["data"], "seq_length": length},
        "target": TARGET,
    }


def _rotary(values: dict[str, Any]) -> dict[str, Any]:
    size = _sizes(values)
    heads, hidden = size("num_attention_heads", MOST_SIZE), size("hidden_size", MOST_SIZE)
    groups = size("num_key_value_heads", MOST_SIZE, heads)
    if heads % groups:
        raise UsageError("num_key_value_heads", groups, f"in {CONFIG}; does not divide the {heads} attention heads")
    if "head_dim" not in values and hidden % heads:
        raise UsageError("hidden_size", hidden, f"in {CONFIG}; the {heads} attention heads do not divide it")
    head = size("head_dim", MOST_SIZE, hidden // heads)
    if head % 2:
        raise UsageError("head_dim", head, f"in {CONFIG}; rotary positions need an even one")
    return {
        "num_layers": size("num_hidden_layers", MOST_LAYERS),
        "hidden_size": hidden,
        "ffn_hidden_size": size("intermediate_size", MOST_SIZE),
        "num_attention_heads": heads,
        "num_query_groups": groups,
        "kv_channels": head,
        "encoder_seq_length": size("max_position_embeddings", MOST_SIZE),
        "layernorm_epsilon": _number("rms_norm_eps", values.get("rms_norm_eps", 1e-6)),
        **_positions(values),
    }


def _learned(values: dict[str, Any]) -> dict[str, Any]:
    size = _sizes(values)
    heads, hidden = size("n_head", MOST_SIZE), size("n_embd", MOST_SIZE)
    if hidden % heads:
        raise UsageError("n_embd", hidden, f"in {CONFIG}; the {heads} attention heads do not divide it")
    activation = values.get("activation_function", "gelu_new")
    if activation not in ACTIVATIONS:
        raise UsageError("activation_function", activation, f"in {CONFIG}; must be one of {', '.join(ACTIVATIONS)}")
    return {
        "num_layers": size("n_layer", MOST_LAYERS),
        "hidden_size": hidden,
        "ffn_hidden_size": size("n_inner", MOST_SIZE, 4 * hidden),
        "num_attention_heads": heads,
        "num_query_groups": heads,
        "kv_channels": hidden // heads,
        "encoder_seq_length": size("n_positions", MOST_SIZE),
        "layernorm_epsilon": _number("layer_norm_epsilon", values.get("layer_norm_epsilon", 1e-5)),
        "openai_gelu": ACTIVATIONS[activation],
    }


def _check_known(family: Family, given: dict[str, Any]) -> None:
    read = _ALL | (_LEARNED if family.modules.positions else _ROTARY)
    if family.kind == "gemma" and given.get("hidden_act", TANH) != TANH:
        # Some versions of transformers take hidden_act for what it says, some for the one with tanh whatever it says.
        way_out = f"versions of transformers compute different things for it; Gemma was trained with {TANH}: write that"
        raise UsageError("hidden_act", given["hidden_act"], f"in {CONFIG}; {way_out}")
    for name, value in given.items():
        if name in family.only:
            if value not in family.only[name]:
                raise UsageError(name, value, f"in {CONFIG}; only {family.only[name][0]} can be run here")
        elif value and name not in read and name not in _OTHER:
            way_out = "not known to leave the result as it is; if it does, take it out of the file"
            raise UsageError(name, value, f"in {CONFIG}; {way_out}")


def _check_windows(family: Family, config: dict[str, Any], given: dict[str, Any]) -> None:
    """Megatron-core's own attention sees the whole text."""
    kinds = given.get("layer_types", [])
    if not isinstance(kinds, list) or any(kind != "full_attention" for kind in kinds):
        raise UsageError("layer_types", kinds, f"in {CONFIG}; only full_attention can be run here")
    if given.get("use_sliding_window"):
        raise UsageError("use_sliding_window", True, f"in {CONFIG}; sliding windows cannot be run here")
    if family.kind in ("qwen2", "qwen3"):  # use_sliding_window decides
        return
    window = config.get("sliding_window", family.defaults.get("sliding_window"))
    length = given.get("max_position_embeddings", 0)
    if window is not None and not (type(window) is int and type(length) is int and window >= length):
        way_out = "sliding windows cannot be run here; texts that are no longer than it do not need it: a model for"
        raise UsageError(
            "sliding_window", window, f"in {CONFIG}; {way_out} those has it as max_position_embeddings, now {length}"
        )


def _sizes(values: dict[str, Any]) -> Callable[..., int]:
    def size(name: str, most: int, default: int | None = None) -> int:
        value = values.get(name, default)
        if type(value) is not int or not 1 <= value <= most:
            raise UsageError(name, value, f"in {CONFIG}; must be a whole number from 1 to {most:,}")
        return value

    return size


def _number(name: str, value: Any) -> float:
    if type(value) not in (int, float) or not 0 < value < float("inf"):
        raise UsageError(name, value, f"in {CONFIG}; must be a number above 0")
    return value


def _positions(values: dict[str, Any]) -> dict[str, Any]:
    """Rotary positions: the newer ``rope_parameters``, or ``rope_theta`` and ``rope_scaling``."""
    where = "rope_parameters" if values.get("rope_parameters") else "rope_scaling"
    rope = values.get(where) or {}
    if not isinstance(rope, dict):
        raise UsageError(where, rope, f"in {CONFIG}; must have named values")
    for name, value in rope.items():
        if isinstance(value, dict):
            raise UsageError(f"{where}.{name}", value, f"in {CONFIG}; positions of each layer's own cannot be run here")
    base = {"rotary_base": _number("rope_theta", rope.get("rope_theta", values.get("rope_theta", 10000.0)))}
    kind = rope.get("rope_type", rope.get("type", "default"))
    known = {"default": (), "linear": ("factor",), "llama3": _LLAMA3}
    if kind not in known:
        raise UsageError(f"{where}.rope_type", kind, f"in {CONFIG}; must be one of {', '.join(known)}")
    allowed = {*known[kind], "rope_type", "type", "rope_theta"}
    for name, value in rope.items():
        if name not in allowed and value not in (None, 1, 1.0):
            raise UsageError(f"{where}.{name}", value, f"in {CONFIG}; not known for rope_type {kind}")
    numbers = {name: _number(f"{where}.{name}", rope.get(name)) for name in known[kind]}
    if kind == "linear":
        return base | {"seq_len_interpolation_factor": numbers["factor"]}
    if kind == "llama3":
        return base | {"scale_positional_embedding": True} | {_LLAMA3[name]: numbers[name] for name in _LLAMA3}
    return base


#: Of Llama 3.1's rotary positions, and what NeMo calls them.
_LLAMA3 = {
    "factor": "scale_factor",
    "low_freq_factor": "low_freq_factor",
    "high_freq_factor": "high_freq_factor",
    "original_max_position_embeddings": "old_context_len",
}
