"""Any adapter as NeMo's own LoRA, of one rank: for stock NeMo, NVIDIA's merge script, TensorRT-LLM's converter."""

import io
import tarfile
from pathlib import Path
from typing import Any

import torch

from nemo_tiedlora.checkpoint.base import BaseFile
from nemo_tiedlora.checkpoint.legacy import ADAPTERS
from nemo_tiedlora.checkpoint.plain_lora import PlainLora, rounded
from nemo_tiedlora.console import progress
from nemo_tiedlora.errors import UsageError
from nemo_tiedlora.files import replacing
from nemo_tiedlora.model.archive import entry
from nemo_tiedlora.model.config import MODEL_CONFIG
from nemo_tiedlora.model.data import dump, over
from nemo_tiedlora.model.targets import TARGETS, places

WEIGHTS = "model_weights.ckpt"


def write(lora: PlainLora, base: BaseFile, out: Path, dtype: torch.dtype) -> dict[str, Any]:
    """Write the adapter to ``out``, a ``.nemo``.

    Where several matrices of a fused projection are adapted, its rank is the sum of theirs.

    Returns:
        The numbers of parameters and of modules, and the rank.

    Raises:
        UsageError: the adapter stretches rows (DoRA), which NeMo's LoRA cannot; or it is inside experts, where that has
            no layers.
    """
    if any(site.routed for site in lora.adapter.sites):
        raise UsageError("format", "nemo-lora", "NeMo's LoRA has no layers inside experts; merge the adapter")
    found = []
    for layer in progress(lora.layers(), "exporting", len(lora.layers())):
        for name, target in ADAPTERS.items():
            pair = lora.pair(TARGETS[target].path, layer, places((target,), lora.adapter.shape))
            if pair is None:
                continue
            if pair.lengths is not None:
                raise UsageError("format", "nemo-lora", "NeMo's LoRA has no lengths of rows (DoRA); merge the adapter")
            found.append((name, target, layer, pair))
    rank = max(len(pair.A) for *_, pair in found)
    state = {}
    for name, target, layer, pair in found:
        inside = TARGETS[target].path.split(".")[0]
        place = f"model.decoder.layers.{layer}.{inside}.adapter_layer.{name}"
        padded = pair.padded(rank)
        for part, tensor in (("in", padded.A), ("out", lora.scale * padded.B)):
            key = f"{place}.linear_{part}.weight"
            state[key] = rounded(key, tensor, dtype)
    _write(lora, base, out, state, sorted({target for _, target, *_ in found}), rank)
    return {"parameters": sum(tensor.numel() for tensor in state.values()), "modules": len(found), "rank": rank}


def _write(
    lora: PlainLora, base: BaseFile, out: Path, state: dict[str, torch.Tensor], targets: list[str], rank: int
) -> None:
    some = len(lora.layers()) < lora.adapter.shape.num_layers
    settings = {
        "variant": "nemo",
        "target_modules": targets,
        "adapter_dim": rank,
        "alpha": rank,  # the scale is in B: NVIDIA's merge script multiplies B and A only
        "adapter_dropout": lora.adapter.config.dropout,
        "column_init_method": "xavier",
        "row_init_method": "zero",
        "layer_selection": [layer + 1 for layer in lora.layers()] if some else None,
        "weight_tying": False,
        "position_embedding_strategy": None,
    }
    own = {"restore_from_path": str(base.archive.path), "peft": {"peft_scheme": "lora", "lora_tuning": settings}}
    one_rank = {"tensor_model_parallel_size": 1, "pipeline_model_parallel_size": 1}
    config = dump(over(base.config, own) | one_rank).encode()
    weights = io.BytesIO()
    torch.save(state, weights)
    with replacing(out) as unfinished, tarfile.open(unfinished, "w", format=tarfile.GNU_FORMAT) as tar:
        for name, content in ((MODEL_CONFIG, config), (WEIGHTS, weights.getvalue())):
            tar.addfile(entry(name, len(content)), io.BytesIO(content))
