"""Adapters in NeMo's own format, one file per tensor and pipeline rank: read safely, and LoRA as canonical ones.

NeMo cuts ``linear_in`` along the rank (column-parallel layers) or along ``in`` (row-parallel ones), always cuts
``linear_out`` along ``out``, and counts each pipeline stage's layers from 0.
"""

import io
import re
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from nemo_tiedlora.checkpoint import pickles
from nemo_tiedlora.checkpoint.adapter import Adapter, Base, settings_of
from nemo_tiedlora.checkpoint.store import CONFIG
from nemo_tiedlora.errors import UsageError
from nemo_tiedlora.model.archive import Archive, opened
from nemo_tiedlora.model.config import read_model_config
from nemo_tiedlora.model.data import ModelConfig
from nemo_tiedlora.model.targets import TARGETS, blocks, expand
from nemo_tiedlora.variants import METHODS, build, config_for

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
        UsageError: not such a file, one of another scheme or kind of LoRA, or one with missing ranks or tensors.
    """
    with opened(Path(path), field) as archive:
        saved = read_model_config(archive, whole=True)
        peft = saved.get("peft") or {}
        if peft.get("peft_scheme") != "lora" or not peft.get("lora_tuning"):
            raise archive.error(f"an adapter of scheme {peft.get('peft_scheme')}; only NeMo's lora can be converted")
        try:
            return _converted(saved, peft["lora_tuning"], archive)
        except UsageError as error:
            raise error if error.value == str(path) else archive.error(str(error)) from None
        except pickles.DAMAGED as error:
            raise archive.error(f"its settings or tensors do not fit each other ({type(error).__name__})") from None


def _converted(saved: ModelConfig, lora: dict[str, Any], archive: Archive) -> Adapter:
    if lora.get("variant", "nemo") != "nemo":
        raise archive.error(f"of LoRA's variant {lora['variant']}, which has other matrices; only nemo has ours")
    settings = {
        "preset": "LoRA",
        "rank": lora["adapter_dim"],
        "alpha": float(lora.get("alpha") or lora["adapter_dim"]),
        "dropout": lora.get("adapter_dropout") or 0.0,
        "target_modules": expand(list(lora.get("target_modules") or ["attention_qkv"])),
        "layer_selection": lora.get("layer_selection") and list(lora["layer_selection"]),
    }
    config = config_for("tied_lora", settings)
    settings = settings_of(config, build(config, saved.num_layers), {})
    return Adapter("tied_lora", settings, Base.of(saved), _whole(_load(archive), saved, archive))


def open_adapter(path: Path, field: str = "adapter") -> tuple[ModelConfig, dict[tuple[int, int], dict[str, Tensor]]]:
    """The config of an adapter in NeMo's form, and its tensors by name for every (pipeline rank, tensor rank).

    Raises:
        UsageError: damaged, one of this program's methods, or one that could run code or is not finite.
    """
    with opened(Path(path), field) as archive:
        saved = read_model_config(archive, whole=True)
        scheme = (saved.get("peft") or {}).get("peft_scheme")
        if scheme in METHODS:  # several at once have no other form, and are read as safely
            way_out = f"without the {CONFIG} that they are saved with; take the file as it was saved, or train it again"
            raise archive.error(f"of scheme {scheme}, {way_out}")
        if not scheme or scheme == "none":
            raise archive.error("a whole model, not an adapter")
        return saved, _load(archive)


def _load(archive: Archive) -> dict[tuple[int, int], dict[str, Tensor]]:
    states = {}
    for name in archive.members:
        ranks = RANKS.fullmatch(name)
        if ranks:
            try:
                state = pickles.load(io.BytesIO(archive.read(name, MOST_WEIGHTS)))
                _check_state(state)
            except pickles.Refused as error:
                raise archive.error(f"{name} in it: {error}") from None
            states[int(ranks[3] or 0), int(ranks[1] or ranks[2] or 0)] = state
    if not states:
        raise archive.error("there is no model_weights.ckpt in it")
    return states


def _check_state(state: Any) -> None:
    if not isinstance(state, dict):
        raise pickles.Refused("not tensors by name")
    for key, tensor in state.items():
        if not isinstance(key, str) or not isinstance(tensor, Tensor) or not tensor.is_floating_point():
            raise pickles.Refused(f"{key} is not a tensor of numbers")
        if not tensor.isfinite().all():
            raise pickles.Refused(f"{key} has NaN or infinity in it")


def _whole(states: dict[tuple[int, int], dict[str, Tensor]], saved: ModelConfig, archive: Archive) -> dict[str, Tensor]:
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
            parts = [states[stage, rank][key] for rank in range(ranks) if key in states[stage, rank]]
            if len(parts) < ranks:
                raise archive.error(f"{key} is missing on some ranks")
            part = "A" if named[3] == "in" else "B"
            tensors[f"{target}.{stage * layers + int(named[1])}.{part}"] = _join(parts, target, part, saved)
    return tensors


def _join(parts: list[Tensor], target: str, part: str, saved: ModelConfig) -> Tensor:
    if part == "A":
        return torch.cat(parts, 1 if TARGETS[target].parallel == "row" else 0)
    count = blocks(target, saved)
    return torch.cat([piece.chunk(count)[block] for block in range(count) for piece in parts])
