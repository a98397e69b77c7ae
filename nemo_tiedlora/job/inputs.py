"""Checks of everything a user gives a job, in the seconds before NeMo is imported."""

from collections.abc import Iterator
from contextlib import contextmanager
from copy import deepcopy
from importlib.util import find_spec
from typing import Any

from omegaconf import DictConfig

from nemo_tiedlora.analysis.texts import read_texts
from nemo_tiedlora.checkpoint.saved import check_adapter
from nemo_tiedlora.errors import UsageError, closest
from nemo_tiedlora.job.calibrate import Calibration
from nemo_tiedlora.model.config import STOCK_SCHEMES
from nemo_tiedlora.model.data import ModelConfig
from nemo_tiedlora.model.sizes import check_fit
from nemo_tiedlora.model.targets import check_outside_experts
from nemo_tiedlora.nemo.rows import check_data
from nemo_tiedlora.variants import METHODS, OF_YOUR_OWN, VariantConfig

#: Schemes of NeMo's that change an MLP, which a base of experts does not have.
IN_THE_MLP = ("parallel_adapter", "ia3")


def check(cfg: DictConfig, base: ModelConfig, method: VariantConfig | None) -> None:
    """Check a fine-tuning job's resolved config against the model config of its base.

    Args:
        method: the settings of its method; None for a scheme of NeMo's.

    Raises:
        UsageError: for the first thing that is wrong.
    """
    scheme = scheme_of(cfg)
    if not base.get("mcore_gpt"):
        raise UsageError("model.restore_from_path", cfg.model.restore_from_path, "not a Megatron-core GPT (mcore_gpt)")
    if method:
        with under(scheme):
            check_method(method, base)
    elif base.get("num_moe_experts"):
        _check_stock_on_experts(scheme, cfg.model.peft, base)
    if cfg.model.peft.restore_from_path:
        check_adapter(cfg.model.peft.restore_from_path, base, "model.peft.restore_from_path", scheme)
    check_layout(cfg.model, base)
    check_sections(cfg.model.data)


def check_scheme(scheme: str) -> None:
    """Raise ``UsageError`` unless the job can run the scheme."""
    if scheme not in METHODS and scheme not in STOCK_SCHEMES:
        way_out = f"{closest(scheme, (*METHODS, *STOCK_SCHEMES))}; {OF_YOUR_OWN}"
        raise UsageError("model.peft.peft_scheme", scheme, way_out)


def _check_stock_on_experts(scheme: str, peft: DictConfig, base: ModelConfig) -> None:
    """Refuse what a scheme of NeMo's cannot do on a base of experts: it would fail in the middle of NeMo."""
    if scheme in IN_THE_MLP:
        way_out = f"the base has {base.num_moe_experts} experts (num_moe_experts) instead of the MLP it changes"
        raise UsageError("model.peft.peft_scheme", scheme, f"{way_out}; use lora, adapter or a scheme of ours")
    with under("lora"):  # the other schemes' sizes are compared with it
        targets = list((peft.get("lora_tuning") or {}).get("target_modules") or [])
        check_outside_experts(targets, f"NeMo's lora does not go into the base's {base.num_moe_experts} experts")


def check_layout(model: DictConfig, base: ModelConfig) -> None:
    """Refuse layouts that NeMo, this machine's layers or the base's shape cannot be run in."""
    interleaved = model.get("virtual_pipeline_model_parallel_size")
    if interleaved not in (None, 1):
        field = "model.virtual_pipeline_model_parallel_size"
        raise UsageError(field, interleaved, "NeMo no longer supports it for these models; set it to null")
    context = model.get("context_parallel_size") or 1
    if context > 1 and not find_spec("transformer_engine"):
        way_out = "needs the attention of Transformer Engine, which is not installed; set it to 1"
        raise UsageError("model.context_parallel_size", context, way_out)
    tensor, pipeline = model.tensor_model_parallel_size, model.pipeline_model_parallel_size
    for name in ("num_attention_heads", "num_query_groups", "ffn_hidden_size", "moe_ffn_hidden_size"):
        if base.get(name) and base[name] % tensor:
            way_out = f"does not divide the base's {name}, {base[name]}"
            raise UsageError("model.tensor_model_parallel_size", tensor, way_out)
    spread = model.get("expert_model_parallel_size") or 1
    if spread > 1:
        raise UsageError("model.expert_model_parallel_size", spread, "experts stay on one rank here; set it to 1")
    if base.get("num_moe_experts") and tensor > 1 and not model.get("sequence_parallel"):
        way_out = f"Megatron trains a base of experts on {tensor} tensor-parallel ranks only with it; set it to true"
        raise UsageError("model.sequence_parallel", False, way_out)
    if base.num_layers % pipeline:
        way_out = f"does not divide the base's {base.num_layers} layers"
        raise UsageError("model.pipeline_model_parallel_size", pipeline, way_out)


def check_sections(data: DictConfig) -> None:
    """Check every data section. None naming files means the built-in task; test rows are optional."""
    splits = ("train_ds", "validation_ds", "test_ds")
    named = [split for split in splits if (data.get(split) or {}).get("file_names") is not None]
    if not named:
        if data.get("chat"):
            raise UsageError("model.data.chat", True, "the built-in task is no chat; name files of chat rows")
        return
    for split in dict.fromkeys(("train_ds", "validation_ds", *named)):
        check_data(data[split], f"model.data.{split}", bool(data.get("chat")))


def scheme_of(cfg: DictConfig) -> str:
    """The scheme's name; NeMo also writes full fine-tuning as null."""
    return str(cfg.model.peft.peft_scheme or "none")


@contextmanager
def under(scheme: str) -> Iterator[None]:
    """Give the settings of a scheme their full names in what is said of them."""
    try:
        yield
    except UsageError as error:
        raise error.under(f"model.peft.{scheme}_tuning") from None


def without_groups(settings: dict[str, Any]) -> dict[str, Any]:
    """The settings, without groups that a calibration is still to find; what that needs is checked."""
    settings = deepcopy(settings)
    for section in (settings, settings.get("settings") or {}):
        if isinstance(section.get("groups"), dict):
            calibration = Calibration.of(section["groups"])
            read_texts(calibration.data, 1, calibration.field)
            section["groups"] = []
    return settings


def check_method(method: VariantConfig, base: ModelConfig) -> None:
    """Check a method's settings against the base's layers."""
    for layer in method.layer_selection or ():
        if not 1 <= layer <= base.num_layers:
            raise UsageError("layer_selection", layer, f"the base has layers 1 to {base.num_layers}")
    check_fit(method, base)
