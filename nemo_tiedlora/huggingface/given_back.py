"""A base becomes a folder that transformers loads: the way back of ``taken_over``, and the way out for other bases."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import torch

from nemo_tiedlora.checkpoint.base import BaseFile, Place, Saved, open_base
from nemo_tiedlora.checkpoint.store import is_canonical
from nemo_tiedlora.console import progress
from nemo_tiedlora.errors import UsageError
from nemo_tiedlora.files import new_folder
from nemo_tiedlora.huggingface.families import ACTIVATIONS, CONFIG, FAMILIES, TANH, model_config
from nemo_tiedlora.huggingface.meaning import meaning
from nemo_tiedlora.huggingface.parts import Part, parts, taken
from nemo_tiedlora.huggingface.record import GENERATION, read_record
from nemo_tiedlora.huggingface.tokens import tokenizer_files
from nemo_tiedlora.huggingface.weights import DTYPES, SINGLE
from nemo_tiedlora.model import tokenizer
from nemo_tiedlora.model.config import MODEL_CONFIG, check_base_config
from nemo_tiedlora.model.data import ModelConfig

#: Has as many rows as the base's vocabulary.
WORDS = "embedding.word_embeddings.weight"
TYPES = {getattr(torch, dtype): name for name, dtype in DTYPES.items()}


def hf_config(config: ModelConfig) -> dict[str, Any]:
    """The content of ``config.json`` for a base.

    Of one that was made of a transformers model it is that model's own. Of any other it follows from the fields; the
    size of the vocabulary, special tokens and the type of the weights, which the fields do not say, are not in it.

    Args:
        config: NeMo's, of a whole base.

    Raises:
        UsageError: a field with a value that no family of transformers computes, or that is not the recorded model's.
    """
    check_base_config(config)
    recorded = read_record(config).get(CONFIG)
    content = recorded or _derived(config)
    own = meaning(ModelConfig(model_config(content)))
    for name, value in meaning(config).items():
        if value != own[name]:
            why = "no family of transformers computes that; the nearest has"
            if recorded:
                why = f"in the base's config; the {CONFIG} that is recorded in it has"
            raise UsageError(name, value, f"{why} {own[name]!r} ({content['architectures'][0]})")
    return content


def _derived(config: ModelConfig) -> dict[str, Any]:
    """The config of the model that is nearest."""
    if config.get("normalization", "layernorm") == "layernorm":
        architecture = "GPT2LMHeadModel"
    elif config.get("layernorm_zero_centered_gamma") and config.get("apply_embedding_scaling"):
        architecture = "GemmaForCausalLM"
    elif config.get("qk_layernorm"):
        architecture = "Qwen3ForCausalLM"
    else:
        architecture = "Qwen2ForCausalLM" if config.get("qkv_bias") else "LlamaForCausalLM"
    length = config.get("max_position_embeddings") or config.get("encoder_seq_length")
    common = {
        "architectures": [architecture],
        "model_type": FAMILIES[architecture].kind,
        "tie_word_embeddings": bool(config.get("share_embeddings_and_output_weights", True)),
        "initializer_range": config.get("init_method_std", 0.02),
    }
    epsilon = config.get("layernorm_epsilon", 1e-5)
    if architecture == "GPT2LMHeadModel":
        tanh = meaning(config)["activation"] == TANH
        return common | {
            "n_layer": config.num_layers,
            "n_embd": config.hidden_size,
            "n_inner": config.ffn_hidden_size,
            "n_head": config.num_attention_heads,
            "n_positions": config.get("encoder_seq_length"),
            "layer_norm_epsilon": epsilon,
            "activation_function": next(name for name, by_tanh in ACTIVATIONS.items() if by_tanh == tanh),
        }
    act = TANH if architecture == "GemmaForCausalLM" else "silu"
    return common | {
        "num_hidden_layers": config.num_layers,
        "hidden_size": config.hidden_size,
        "intermediate_size": config.ffn_hidden_size,
        "num_attention_heads": config.num_attention_heads,
        "num_key_value_heads": config.get("num_query_groups") or config.num_attention_heads,
        "head_dim": config.get("kv_channels") or config.hidden_size // config.num_attention_heads,
        "max_position_embeddings": length,
        "rms_norm_eps": epsilon,
        "rope_theta": config.get("rotary_base", 10000),
        "rope_scaling": _scaling(config),
        "hidden_act": act,
    } | ({"hidden_activation": act} if act == TANH else {})  # fmt: skip


def _scaling(config: ModelConfig) -> dict[str, Any] | None:
    if config.get("scale_positional_embedding"):
        return {
            "rope_type": "llama3",
            "factor": config.get("scale_factor", 8),
            "low_freq_factor": config.get("low_freq_factor", 1),
            "high_freq_factor": config.get("high_freq_factor", 4),
            "original_max_position_embeddings": config.get("old_context_len", 8192),
        }
    if config.get("seq_len_interpolation_factor"):
        return {"rope_type": "linear", "factor": config.seq_len_interpolation_factor}
    return None


def give_back(path: Path, out: Path) -> dict[str, Any]:
    """Write the base at ``path`` as a folder that transformers loads; it appears when it is whole.

    Tensors are read and written one at a time, bit by bit as they are. Rows that were added to the vocabulary are left
    out.

    Args:
        out: a folder, which is new or empty.

    Returns:
        What was written.

    Raises:
        UsageError: not a base, or one that no family of transformers computes; NaN or infinity in a weight; there is
            something at ``out``.
    """
    if path.is_file() and is_canonical(path, "base"):
        raise UsageError("base", str(path), "an adapter, not a base; tiedlora merge writes it into one")
    with new_folder(out, "out") as unfinished, open_base(path) as base:
        content = hf_config(base.config)
        recorded = read_record(base.config)
        files, tokens = tokenizer_files(base)
        words = base.saved.get(Place(WORDS), Saved((0, 0), torch.float32)).shape[0]
        rows = content.get("vocab_size") or tokens.get("vocab_size") or words
        if type(rows) is not int or not 0 < rows <= words:
            raise base.archive.error(f"its embedding has {words} rows, too few for a vocabulary of {rows}")
        own = list(parts(FAMILIES[content["architectures"][0]].modules, base.config, rows, words))
        types = _check_tensors(base, own)
        if CONFIG not in recorded:
            content |= tokens | {"vocab_size": rows, "torch_dtype": types[0] if len(types) == 1 else "float32"}
        files |= {CONFIG: _json(content)}
        if GENERATION in recorded:
            files[GENERATION] = _json(recorded[GENERATION])
        for name, text in files.items():
            (unfinished / name).write_bytes(text)
        _write_tensors(unfinished / SINGLE, base, own)
    return {
        "folder": str(out),
        "architecture": content["architectures"][0],
        "parameters": sum(math.prod(source.shape) for part in own for source in part.sources),
        "types": ", ".join(types),
        "vocabulary": rows,
        "tokenizer": tokenizer.TOKENIZER in files,
    }


def _json(content: dict[str, Any]) -> bytes:
    return json.dumps(content, indent=2, ensure_ascii=False).encode() + b"\n"


def _check_tensors(base: BaseFile, own: list[Part]) -> list[str]:
    """What the base has is what the model has; returns the types of its tensors."""
    for part in own:
        layer = "" if part.layer is None else f" of layer {part.layer}"
        saved = base.saved.get(Place(part.name, part.layer))
        if not saved:
            raise base.archive.error(f"there is no {part.name}{layer} in it, which its {MODEL_CONFIG} asks for")
        if saved.shape != part.shape:
            raise base.archive.error(
                f"{part.name}{layer} in it has shape {saved.shape}; its {MODEL_CONFIG} says {part.shape}"
            )
        if saved.dtype not in TYPES:
            raise base.archive.error(f"{part.name}{layer} in it is of type {saved.dtype}, in which no model is run")
    for place in base.saved.keys() - {Place(part.name, part.layer) for part in own}:
        raise base.archive.error(f"there is no place for its tensor {place.name} in a transformers model")
    return sorted({str(base.saved[Place(part.name, part.layer)].dtype).removeprefix("torch.") for part in own})


def _write_tensors(path: Path, base: BaseFile, own: list[Part]) -> None:
    """A safetensors file: the list of its tensors first, then their bytes."""
    listed: dict[str, Any] = {"__metadata__": {"format": "pt"}}
    end = 0
    for part in own:
        dtype = base.saved[Place(part.name, part.layer)].dtype
        for source in part.sources:
            begin, end = end, end + math.prod(source.shape) * dtype.itemsize
            listed[source.name] = {"dtype": TYPES[dtype], "shape": source.shape, "data_offsets": [begin, end]}
    header = json.dumps(listed).encode()
    header += b" " * (-len(header) % 8)
    with path.open("wb") as file:
        file.write(len(header).to_bytes(8, "little") + header)
        for part in progress(own, "giving back", len(own)):
            tensor = base.tensor(Place(part.name, part.layer))
            if not all(value.isfinite() for value in tensor.aminmax()):
                raise base.archive.error(f"{part.name} in it has NaN or infinity in it")
            for source in part.sources:
                made = taken(tensor, source, base.config).contiguous()
                file.write(made.view(-1).view(torch.uint8).numpy().data)
                del made
            del tensor  # else it would be there beside the next
