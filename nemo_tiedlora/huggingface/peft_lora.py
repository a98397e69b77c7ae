"""Any adapter as a plain LoRA adapter of Hugging Face PEFT, which vLLM, TensorRT-LLM and others serve as well."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

from nemo_tiedlora.console import progress
from nemo_tiedlora.huggingface.modules import Modules
from nemo_tiedlora.model.targets import TARGETS, places

if TYPE_CHECKING:
    from torch import Tensor, dtype

    from nemo_tiedlora.checkpoint.plain_lora import Pair, PlainLora

WEIGHTS, CONFIG = "adapter_model.safetensors", "adapter_config.json"
#: What PEFT puts before the name of every module.
PREFIX = "base_model.model."


def write(lora: PlainLora, modules: Modules, folder: Path, dtype: dtype, base_name: str | None) -> dict[str, Any]:
    """Write the adapter into ``folder``: ``adapter_config.json`` and ``adapter_model.safetensors``.

    Args:
        modules: the linear layers of the transformers model.
        base_name: what PEFT is told of the model's name; None: nothing.

    Returns:
        The numbers of parameters and of modules, and the rank.
    """
    tensors: dict[str, Tensor] = {}
    found = list(pairs(lora, modules))
    rank = max(len(pair.A) for _, _, pair in found)
    for name, layer, pair in found:
        place = f"{PREFIX}{modules.layers}.{layer}.{name}"
        padded = pair.padded(rank)
        tensors |= {f"{place}.lora_A.weight": padded.A, f"{place}.lora_B.weight": padded.B}
        if pair.lengths is not None:
            tensors[f"{place}.lora_magnitude_vector"] = pair.lengths
    alpha = lora.scale * rank
    config = {
        **common("LORA", lora, modules, [name for name, _, _ in found], base_name),
        "r": rank,
        "lora_alpha": int(alpha) if alpha == int(alpha) else alpha,
        "lora_dropout": lora.adapter.config.dropout,
        "use_dora": any(pair.lengths is not None for _, _, pair in found),
        "use_rslora": False,
        "init_lora_weights": True,
        "rank_pattern": {},
        "alpha_pattern": {},
    }
    save(folder, config, tensors, dtype)
    return {"parameters": sum(tensor.numel() for tensor in tensors.values()), "modules": len(found), "rank": rank}


def pairs(lora: PlainLora, modules: Modules) -> Iterator[tuple[str, int, Pair]]:
    """What the adapter does to each linear layer that it changes, by the layer's name and number."""
    for layer in progress(lora.layers(), "exporting", len(lora.layers())):
        for module in modules.linear:
            pair = lora.pair(TARGETS[module.parts[0]].path, layer, places(module.parts, lora.adapter.shape))
            if pair:
                yield module.name, layer, pair


def common(kind: str, lora: PlainLora, modules: Modules, changed: list[str], base_name: str | None) -> dict[str, Any]:
    """What every kind of PEFT's configs says.

    Args:
        changed: names of the modules that there are tensors for, below their layers.
    """
    some = len(lora.layers()) < lora.adapter.shape.num_layers
    return {
        "peft_type": kind,
        "task_type": "CAUSAL_LM",
        "base_model_name_or_path": base_name,
        "inference_mode": True,
        "target_modules": sorted({shortest(name, modules) for name in changed}),
        "layers_to_transform": lora.layers() if some else None,
        "layers_pattern": modules.layers.rsplit(".", 1)[-1] if some else None,
        "fan_in_fan_out": modules.transposed,
        "bias": "none",
        "modules_to_save": None,
    }


def shortest(name: str, modules: Modules) -> str:
    """The last part of a module's name, which PEFT and engines look for; all of it where another ends in that too."""
    last = name.rsplit(".", 1)[-1]
    return last if sum(module.name.endswith(f".{last}") for module in modules.linear) == 1 else name


def save(folder: Path, config: dict[str, Any], tensors: dict[str, Tensor], dtype: dtype) -> None:
    """Write PEFT's two files."""
    from safetensors.torch import save_file

    from nemo_tiedlora.checkpoint.plain_lora import rounded

    plain = {name: rounded(name, tensor, dtype) for name, tensor in tensors.items()}  # copies: none may share memory
    save_file(plain, folder / WEIGHTS, {"format": "pt"})
    (folder / CONFIG).write_text(json.dumps(config, indent=2) + "\n", encoding="utf-8")
