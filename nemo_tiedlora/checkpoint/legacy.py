"""LoRA adapters in NeMo's own format, one file per tensor and pipeline rank, as canonical ones.

NeMo cuts ``linear_in`` along the rank (column-parallel layers) or along ``in`` (row-parallel ones), always cuts
``linear_out`` along ``out``, and counts each pipeline stage's layers from 0.
"""

import io
import pickle
import re
from pathlib import Path
from typing import Any

import torch
from omegaconf import DictConfig, OmegaConf
from torch import Tensor
from yaml import YAMLError

from nemo_tiedlora.checkpoint.adapter import Adapter, Base, settings_of
from nemo_tiedlora.checkpoint.archive import Archive, opened
from nemo_tiedlora.checkpoint.store import MODEL_CONFIG, MOST_BYTES
from nemo_tiedlora.nemo.targets import TARGETS, blocks, expand
from nemo_tiedlora.variants import build, config_for

#: NeMo's name of an adapter, and its target.
ADAPTERS = {
    "lora_kqv_adapter": "attention_qkv",
    "lora_dense_attention_adapter": "attention_dense",
    "lora_hto4h_adapter": "mlp_fc1",
    "lora_4htoh_adapter": "mlp_fc2",
}
KEY = re.compile(
    r"model\.(?:module\.)?decoder\.layers\.(\d+)\.\w+\.adapter_layer\.(\w+)\.linear_(in|out)\.weight", re.ASCII
)
RANKS = re.compile(r"(?:(?:mp_rank_(\d+)|tp_rank_(\d+)_pp_rank_(\d+))/)?model_weights\.ckpt")
#: An adapter's weights on one rank cannot be larger.
MOST_WEIGHTS = 2**36


def convert(path: Path, field: str = "adapter") -> Adapter:
    """NeMo's LoRA adapter at ``path`` as one of scheme ``tied_lora`` with preset LoRA, which computes the same.

    Raises:
        UsageError: not such a file, one of another scheme or variant, or one with missing ranks or tensors.
    """
    with opened(Path(path), field) as archive:
        try:
            saved = OmegaConf.create(archive.read(MODEL_CONFIG, MOST_BYTES).decode())
        except (UnicodeDecodeError, YAMLError) as error:
            raise archive.error(f"its {MODEL_CONFIG} is damaged ({type(error).__name__})") from None
        peft = saved.get("peft") or {}
        if peft.get("peft_scheme") != "lora" or not peft.get("lora_tuning"):
            raise archive.error(f"an adapter of scheme {peft.get('peft_scheme')}; only NeMo's lora can be converted")
        lora = peft.lora_tuning
        if lora.get("variant", "nemo") != "nemo":
            raise archive.error(f"of LoRA's variant {lora.variant}, which has other matrices; only nemo has ours")
        settings = {
            "preset": "LoRA",
            "rank": lora.adapter_dim,
            "alpha": float(lora.get("alpha") or lora.adapter_dim),
            "dropout": lora.get("adapter_dropout") or 0.0,
            "target_modules": expand(list(lora.get("target_modules") or ["attention_qkv"])),
            "layer_selection": lora.get("layer_selection") and list(lora.layer_selection),
        }
        config = config_for("tied_lora", settings)
        settings = settings_of(config, build(config, saved.num_layers), {})
        return Adapter("tied_lora", settings, Base.of(saved), _whole(_load(archive), saved, archive))


def _load(archive: Archive) -> dict[tuple[int, int], dict[str, Any]]:
    """The state dict of every (pipeline rank, tensor rank)."""
    states = {}
    for name in archive.members:
        ranks = RANKS.fullmatch(name)
        if ranks:
            content = io.BytesIO(archive.read(name, MOST_WEIGHTS))
            try:
                state = torch.load(content, map_location="cpu", weights_only=True)
            except (pickle.UnpicklingError, RuntimeError, EOFError, ValueError, KeyError) as error:
                raise archive.error(f"{name} in it cannot be read ({type(error).__name__})") from None
            states[int(ranks[3] or 0), int(ranks[1] or ranks[2] or 0)] = state
    if not states:
        raise archive.error("there is no model_weights.ckpt in it")
    return states


def _whole(states: dict[tuple[int, int], dict[str, Any]], saved: DictConfig, archive: Archive) -> dict[str, Tensor]:
    stages, ranks = (1 + max(numbers) for numbers in zip(*states, strict=True))
    for stage in range(stages):
        for rank in range(ranks):
            if (stage, rank) not in states:
                raise archive.error(f"the part of tensor rank {rank}, pipeline rank {stage} is missing in it")
    layers = saved.num_layers // stages
    tensors = {}
    for stage in range(stages):
        for key in states[stage, 0]:
            named = KEY.fullmatch(key)
            if not named or named[2] not in ADAPTERS:
                raise archive.error(f"{key} in it is not of a LoRA adapter that this program knows")
            target = ADAPTERS[named[2]]
            parts = [states[stage, rank].get(key) for rank in range(ranks)]
            if not all(isinstance(part, Tensor) for part in parts):
                raise archive.error(f"{key} is missing on some ranks")
            part = "A" if named[3] == "in" else "B"
            tensors[f"{target}.{stage * layers + int(named[1])}.{part}"] = _join(parts, target, part, saved)
    return tensors


def _join(parts: list[Tensor], target: str, part: str, saved: DictConfig) -> Tensor:
    if part == "A":
        return torch.cat(parts, 1 if TARGETS[target].parallel == "row" else 0)
    count = blocks(target, saved)
    return torch.cat([piece.chunk(count)[block] for block in range(count) for piece in parts])
