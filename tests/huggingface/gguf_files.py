"""GGUF files as llama.cpp's converter writes them, of models that transformers saved."""

import gguf
import numpy
import torch

#: Architectures by ``model_type``, as the format has them.
ARCHITECTURES = {"llama": gguf.MODEL_ARCH.LLAMA, "qwen2": gguf.MODEL_ARCH.QWEN2, "qwen3": gguf.MODEL_ARCH.QWEN3}
TYPES = gguf.GGMLQuantizationType


def write(path, model, tokenizer, kind=TYPES.F32, tensors=None, **settings):
    """Write a model; matrices in the given type, the vocabulary in eight bits where they are quantised.

    Args:
        tensors: more of them. settings: more of them, or None for one to be left out; ``__`` stands for a dot.
    """
    config = model.config
    writer = gguf.GGUFWriter(path, config.model_type)
    own = {
        f"{config.model_type}.{name}": value
        for name, value in {
            "block_count": config.num_hidden_layers,
            "context_length": config.max_position_embeddings,
            "embedding_length": config.hidden_size,
            "feed_forward_length": config.intermediate_size,
            "attention.head_count": config.num_attention_heads,
            "attention.head_count_kv": config.num_key_value_heads,
            "attention.layer_norm_rms_epsilon": config.rms_norm_eps,
            "rope.freq_base": float(config.rope_theta),
            "vocab_size": config.vocab_size,
        }.items()
    }
    if config.model_type == "qwen3":
        own |= {"qwen3.attention.key_length": config.head_dim, "qwen3.attention.value_length": config.head_dim}
    own |= {"general.name": "tiny", **tokens(tokenizer, config.vocab_size)}
    for name, value in (own | {name.replace("__", "."): value for name, value in settings.items()}).items():
        if value is not None:
            add(writer, name, value)
    names = gguf.get_tensor_name_map(ARCHITECTURES[config.model_type], config.num_hidden_layers)
    state = {name: tensor for name, tensor in model.state_dict().items()
             if not (name == "lm_head.weight" and config.tie_word_embeddings)}  # fmt: skip
    for name, tensor in state.items():
        stem, suffix = name.rsplit(".", 1)
        values = tensor.float().numpy()
        if config.model_type == "llama" and stem.endswith(("q_proj", "k_proj")):
            heads = config.num_attention_heads if stem.endswith("q_proj") else config.num_key_value_heads
            values = values.reshape(heads, 2, -1, values.shape[1]).swapaxes(1, 2).reshape(values.shape)
        own_kind = kind if values.ndim > 1 else TYPES.F32
        if "embed_tokens" in name and kind not in (TYPES.F32, TYPES.F16, TYPES.BF16):
            own_kind = TYPES.Q8_0
        stored = gguf.quants.quantize(numpy.ascontiguousarray(values), own_kind)
        writer.add_tensor(f"{names.get_name(stem)}.{suffix}", stored, raw_dtype=own_kind)
    for name, tensor in (tensors or {}).items():
        writer.add_tensor(name, torch.as_tensor(tensor).numpy())
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


def add(writer, name, value):
    adders = {bool: writer.add_bool, int: writer.add_uint32, float: writer.add_float32, str: writer.add_string}
    adders.get(type(value), writer.add_array)(name, value)


def tokens(tokenizer, count):
    """The settings of a byte-level tokenizer, filled up to ``count`` tokens."""
    import json

    words = {number: token for token, number in tokenizer.get_vocab().items()}
    merges = json.loads(tokenizer.backend_tokenizer.to_str())["model"]["merges"]
    special = set(tokenizer.all_special_ids)
    return {
        "tokenizer.ggml.model": "gpt2",
        "tokenizer.ggml.pre": "gpt-2",
        "tokenizer.ggml.tokens": [words.get(number, f"[PAD{number}]") for number in range(count)],
        "tokenizer.ggml.token_type": [
            3 if number in special else 1 if number in words else 5 for number in range(count)
        ],
        "tokenizer.ggml.merges": [" ".join(merge) for merge in merges],
        "tokenizer.ggml.unknown_token_id": 0,
        "tokenizer.ggml.bos_token_id": 1,
        "tokenizer.ggml.eos_token_id": 2,
        "tokenizer.chat_template": tokenizer.chat_template,
    }
