"""Any adapter as a LoRA in GGUF, which llama.cpp reads; the ``gguf`` package knows the names and writes the file."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

from nemo_tiedlora.errors import UsageError
from nemo_tiedlora.files import replacing
from nemo_tiedlora.huggingface.families import Family
from nemo_tiedlora.huggingface.peft_lora import pairs

if TYPE_CHECKING:
    from torch import Tensor, dtype

    from nemo_tiedlora.checkpoint.plain_lora import PlainLora

#: GGUF's name of an architecture where it is not transformers' ``model_type``.
ARCHITECTURES = {"mistral": "llama"}
#: Of these architectures llama.cpp keeps each head's rows in another order, first and second halves alternating.
ALTERNATING = ("llama",)


def write(lora: PlainLora, family: Family, out: Path, dtype: dtype) -> dict[str, Any]:
    """Write the adapter to ``out``, a ``.gguf``.

    Returns:
        The numbers of parameters and of modules, and the largest rank.

    Raises:
        UsageError: ``gguf`` is not installed, the adapter stretches rows (DoRA), or bfloat16, which numpy lacks.
    """
    from nemo_tiedlora.checkpoint.plain_lora import rounded

    try:
        import gguf
    except ImportError:
        raise UsageError("format", "gguf-lora", "needs the package gguf: pip install gguf") from None
    if str(dtype) == "torch.bfloat16":
        raise UsageError("dtype", "bfloat16", "a gguf-lora is written in float32 or float16")
    kind = ARCHITECTURES.get(family.kind, family.kind)
    architecture = next(number for number, name in gguf.MODEL_ARCH_NAMES.items() if name == kind)
    names = gguf.get_tensor_name_map(architecture, lora.adapter.shape.num_layers)
    found = list(pairs(lora, family.modules))
    if any(pair.lengths is not None for *_, pair in found):
        raise UsageError("format", "gguf-lora", "llama.cpp has no lengths of rows (DoRA); merge the adapter")
    rank = max(len(pair.A) for *_, pair in found)
    parameters = 0
    with replacing(out) as unfinished:
        writer = gguf.GGUFWriter(unfinished, kind)
        writer.add_type(gguf.GGUFType.ADAPTER)
        writer.add_string(gguf.Keys.Adapter.TYPE, "lora")
        writer.add_float32(gguf.Keys.Adapter.LORA_ALPHA, lora.scale * rank)
        for name, layer, pair in found:
            place = names.get_name(f"{family.modules.layers}.{layer}.{name}")
            padded = pair.padded(rank)
            B = _alternating(padded.B, name, lora) if kind in ALTERNATING else padded.B
            for part, tensor in (("a", padded.A), ("b", B)):
                key = f"{place}.weight.lora_{part}"
                writer.add_tensor(key, rounded(key, tensor, dtype).numpy())
                parameters += tensor.numel()
        writer.write_header_to_file()
        writer.write_kv_data_to_file()
        writer.write_tensors_to_file()
        writer.close()
    return {"parameters": parameters, "modules": len(found), "rank": rank}


def _alternating(B: Tensor, name: str, lora: PlainLora) -> Tensor:
    """B (out, rank) of a query or key projection in llama.cpp's order of rows; any other as it is."""
    shape = lora.adapter.shape
    heads = {"self_attn.q_proj": shape.num_attention_heads, "self_attn.k_proj": shape.get("num_query_groups")}
    if name not in heads:
        return B
    count = heads[name] or shape.num_attention_heads
    return B.view(count, 2, -1, B.shape[1]).transpose(1, 2).reshape(B.shape)
