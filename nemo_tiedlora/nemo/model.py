"""Building the host: a trainer, and a base model from a ``.nemo`` with or without an adapter."""

from functools import partial
from pathlib import Path

import torch
from lightning.pytorch import Callback, Trainer
from megatron.core import tensor_parallel
from nemo.collections.nlp.models.language_modeling.megatron_gpt_sft_model import MegatronGPTSFTModel
from nemo.collections.nlp.parts.megatron_trainer_builder import MegatronLMPPTrainerBuilder
from nemo.collections.nlp.parts.peft_config import PEFT_CONFIG_MAP
from nemo.utils.exp_manager import exp_manager
from omegaconf import DictConfig, open_dict
from torch.distributed.checkpoint.api import CheckpointException

from nemo_tiedlora.checkpoint.base import check_base
from nemo_tiedlora.checkpoint.pickles import as_it_is
from nemo_tiedlora.errors import UsageError
from nemo_tiedlora.nemo.epochs import Epochs
from nemo_tiedlora.nemo.hooks import register
from nemo_tiedlora.nemo.peft_config import FactorPEFTConfig
from nemo_tiedlora.nemo.resume import keep_one_last
from nemo_tiedlora.variants import VariantConfig

BASE = "model.restore_from_path"


def build_trainer(cfg: DictConfig, callbacks: list[Callback]) -> tuple[Trainer, Path | None]:
    """NeMo's trainer for a fine-tuning config, and the folder that its experiment manager logs to."""
    with open_dict(cfg):
        # Ours shows more; Lightning refuses the flag together with a bar of its own class only.
        cfg.trainer.enable_progress_bar = False
        cfg.trainer.enable_model_summary = False
    trainer = MegatronLMPPTrainerBuilder(cfg).create_trainer(callbacks)
    manager = cfg.get("exp_manager")
    named = bool(manager and manager.get("name"))  # without a name nothing is logged or kept
    if named and manager.resume_if_exists:
        keep_one_last(Path(manager.explicit_log_dir or Path(manager.exp_dir) / manager.name))
    folder = exp_manager(trainer, cfg.exp_manager) if named else None
    trainer.fit_loop.epoch_loop = Epochs(trainer, trainer.min_steps, trainer.max_steps)
    # Validate by steps of the whole run, not of an epoch, so that a resumed run keeps the rhythm. exp_manager compares
    # the epoch setting with a number, so it cannot be null from the start.
    trainer.check_val_every_n_epoch = None
    return trainer, folder


def build_model(
    cfg: DictConfig, base_path: Path, trainer: Trainer, method: VariantConfig | None = None
) -> MegatronGPTSFTModel:
    """The base with a new adapter, with a saved one (``model.peft.restore_from_path``), or (scheme none) as it is.

    Args:
        method: the settings of our scheme, where they have been parsed already.

    Raises:
        UsageError: a base that could run code, or that NeMo cannot restore.
    """
    register()
    check_base(Path(base_path), BASE)
    with as_it_is(base_path):
        merged, model = _restored(cfg, str(base_path), trainer)
    tensor_parallel.model_parallel_cuda_manual_seed(cfg.model.seed)
    if method:
        make_peft = [partial(FactorPEFTConfig, method.scheme, config=method)]
    else:
        make_peft = [PEFT_CONFIG_MAP[name] for name in str(cfg.model.peft.peft_scheme).split(",")]
    if cfg.model.peft.restore_from_path:
        model.load_adapters(cfg.model.peft.restore_from_path, [make(merged) for make in make_peft])
    elif None not in make_peft:
        model.add_adapter([make(merged) for make in make_peft])
    return model


def _restored(cfg: DictConfig, base_path: str, trainer: Trainer) -> tuple[DictConfig, MegatronGPTSFTModel]:
    """The base and its config; what a stranger's config or weights make fail is that file's fault."""
    try:
        merged = MegatronGPTSFTModel.merge_cfg_with(base_path, cfg)
        with open_dict(merged):
            merged.use_cpu_initialization = trainer.strategy.root_device.type == "cpu"
            merged.expert_model_parallel_size = cfg.model.get("expert_model_parallel_size") or 1  # not the base's own
        return merged, MegatronGPTSFTModel.restore_from(base_path, merged, trainer=trainer)
    except (torch.OutOfMemoryError, OSError):
        raise
    except Exception as error:
        if isinstance(error, CheckpointException):  # of several ranks
            error, _ = next(iter(error.failures.values()))
        reason = (str(error).splitlines() or [""])[0]
        raise UsageError(BASE, base_path, f"NeMo cannot restore it ({type(error).__name__}: {reason})") from error
