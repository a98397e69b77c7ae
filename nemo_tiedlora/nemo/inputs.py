"""Checks of everything a user gives a job, in the seconds before NeMo is imported."""

import shutil
import tempfile
from importlib.util import find_spec
from pathlib import Path

from omegaconf import DictConfig, OmegaConf

from nemo_tiedlora.checkpoint import is_canonical, read
from nemo_tiedlora.checkpoint.archive import opened
from nemo_tiedlora.checkpoint.legacy import open_adapter
from nemo_tiedlora.checkpoint.model_config import config_as_it_is, parse, read_model_config
from nemo_tiedlora.checkpoint.pickles import is_trusted, with_digest
from nemo_tiedlora.errors import UsageError, closest
from nemo_tiedlora.nemo.calibrate import Calibration, read_texts
from nemo_tiedlora.nemo.rows import check_data
from nemo_tiedlora.nemo.sizes import check_fit
from nemo_tiedlora.nemo.targets import SHAPE_FIELDS, is_gated
from nemo_tiedlora.own_methods import OF_YOUR_OWN
from nemo_tiedlora.variants import METHODS, config_for

#: Baselines that the job runs, NeMo's own but for parallel_adapter; the key of their settings under model.peft.
STOCK_SCHEMES = {
    "lora": "lora_tuning",
    "adapter": "adapter_tuning",
    "parallel_adapter": "adapter_tuning",
    "ia3": "ia3_tuning",
    "ptuning": "p_tuning",
    "none": None,
}

#: A run writes checkpoints, logs and the adapter; less free disk than this is not worth starting with.
MINIMUM_FREE_BYTES = 64 * 2**20


def check(cfg: DictConfig, base: DictConfig) -> None:
    """Check a fine-tuning job's resolved config against the model config of its base.

    Raises:
        UsageError: for the first thing that is wrong.
    """
    scheme = scheme_of(cfg)
    if scheme not in METHODS and scheme not in STOCK_SCHEMES:
        raise UsageError(
            "model.peft.peft_scheme", scheme, f"{closest(scheme, (*METHODS, *STOCK_SCHEMES))}; {OF_YOUR_OWN}"
        )
    if not base.get("mcore_gpt"):
        raise UsageError("model.restore_from_path", cfg.model.restore_from_path, "not a Megatron-core GPT (mcore_gpt)")
    if scheme in METHODS:
        check_variant(scheme, cfg.model.peft.get(f"{scheme}_tuning"), base)
    if cfg.model.peft.restore_from_path:
        check_adapter(cfg.model.peft.restore_from_path, base, "model.peft.restore_from_path", scheme)
    check_layout(cfg.model, base)
    check_sections(cfg.model.data)


def check_layout(model: DictConfig, base: DictConfig) -> None:
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
    for name in ("num_attention_heads", "num_query_groups", "ffn_hidden_size"):
        if base.get(name) and base[name] % tensor:
            way_out = f"does not divide the base's {name}, {base[name]}"
            raise UsageError("model.tensor_model_parallel_size", tensor, way_out)
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


def check_variant(scheme: str, section: DictConfig | None, base: DictConfig) -> None:
    """Check one of our schemes' settings against the base's layers."""
    try:
        settings = OmegaConf.to_container(section) if section else {}
        shared = settings if scheme == "share_lora" else settings.get("settings") or {}
        if isinstance(shared.get("groups"), dict):  # found later
            calibration = Calibration.of(shared["groups"])
            read_texts(calibration.data, 1, calibration.field)
            shared["groups"] = []
        config = config_for(scheme, settings)
        for layer in config.layer_selection or ():
            if not 1 <= layer <= base.num_layers:
                raise UsageError("layer_selection", layer, f"the base has layers 1 to {base.num_layers}")
        check_fit(config, base)
    except UsageError as error:
        raise error.under(f"model.peft.{scheme}_tuning") from None


def nemo_config(path: str | Path, field: str) -> DictConfig:
    """The model config of a base ``.nemo``, without a look at the rest; what loads it calls ``check_base`` first."""
    with opened(Path(path), field) as archive:
        return read_model_config(archive, whole=True)


def saved_config(path: str | Path, field: str) -> DictConfig:
    """The model config saved with an adapter, in the canonical form or in NeMo's; all of the adapter is checked."""
    path = Path(path)
    if not is_canonical(path, field):
        if is_trusted(path):
            return config_as_it_is(path, field)
        try:
            return open_adapter(path, field)[0]
        except UsageError as error:
            raise with_digest(error, path) from None
    adapter = read(path, field)
    own = parse(adapter.model_config.encode()) if adapter.model_config else OmegaConf.create({"mcore_gpt": True})
    return adapter.put_into(OmegaConf.merge(own, adapter.base.shape))


def check_adapter(path: str | Path, base: DictConfig, field: str, scheme: str | None = None) -> DictConfig:
    """The config saved with an adapter, once it is known to fit ``base`` (and ``scheme``, if given)."""
    saved = saved_config(path, field)
    trained = (saved.get("peft") or {}).get("peft_scheme")
    if not trained or trained == "none":
        raise UsageError(field, str(path), "a whole model, not an adapter")
    if scheme not in (None, trained):
        raise UsageError(field, str(path), f"an adapter of scheme {trained}; set model.peft.peft_scheme={trained}")
    check_shape(saved, base, field, path)
    return saved


def check_shape(saved: DictConfig, base: DictConfig, field: str, path: str | Path) -> None:
    """Raise ``UsageError`` unless an adapter's base had the shape of ``base``."""
    for name in SHAPE_FIELDS:
        if saved.get(name) != base.get(name):
            raise UsageError(
                field, str(path), f"made for another base: {name} was {saved.get(name)}, here it is {base.get(name)}"
            )
    if is_gated(saved) != is_gated(base):
        raise UsageError(field, str(path), f"made for another base: its activation was {saved.get('activation')}")


def check_output(folder: Path, field: str) -> None:
    """Make ``folder`` and prove that it can be written to."""
    try:
        folder.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=folder):
            pass
    except OSError as error:
        raise UsageError(field, str(folder), f"cannot be written to ({error.strerror})") from None
    free = shutil.disk_usage(folder).free
    if free < MINIMUM_FREE_BYTES:
        raise UsageError(
            field, str(folder), f"no disk space: {free / 2**20:.0f} MiB free, {MINIMUM_FREE_BYTES / 2**20:.0f} needed"
        )
