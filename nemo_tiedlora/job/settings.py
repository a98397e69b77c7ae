"""Settings of a job that are names, numbers or switches, checked before anything is loaded.

What is said here of a setting holds where it is given: a section or a setting that is not there is NeMo's to fill in.
"""

import math
import os
from collections.abc import Callable
from typing import Any

from omegaconf import DictConfig, ListConfig, OmegaConf

from nemo_tiedlora.errors import UsageError, check_choice

#: NeMo's names, but for those of optimizers that Apex alone has and nothing here stands in for.
OPTIMIZERS = (
    "sgd", "adam", "adamw", "adadelta", "adamax", "adagrad", "rmsprop", "rprop", "novograd", "adafactor", "adan",
    "fused_adam", "distributed_fused_adam", "megatron_fused_adam", "mcore_distributed_optim", "lamb",
)  # fmt: skip
SCHEDULES = (
    "WarmupPolicy", "WarmupHoldPolicy", "SquareAnnealing", "CosineAnnealing", "NoamAnnealing", "NoamHoldAnnealing",
    "WarmupAnnealing", "InverseSquareRootAnnealing", "T5InverseSquareRootAnnealing", "SquareRootAnnealing",
    "PolynomialDecayAnnealing", "PolynomialHoldDecayAnnealing", "StepLR", "ExponentialLR", "ReduceLROnPlateau",
    "CyclicLR",
)  # fmt: skip
#: NeMo names more, and fails to make any other for text.
METRICS = ("loss", "exact_string_match", "rouge")
PRECISIONS = ("32", "32-true", "bf16", "bf16-mixed", "16", "16-mixed")
ACCELERATORS = ("auto", "gpu", "cuda", "cpu")
NO_GPU = "there is no GPU here; set it to cpu or auto"
GRANULARITIES = ("selective", "full")
RECOMPUTE_METHODS = ("uniform", "block")
CHAT_PROMPT_TOKENS = ("system_turn_start", "turn_start", "label_start", "end_of_turn", "end_of_name")


def _whole(least: int, most: float = math.inf) -> tuple[Callable[[Any], bool], str]:
    wanted = f"a whole number from {least}" if most == math.inf else f"a whole number from {least} to {most}"
    return lambda value: type(value) is int and least <= value <= most, wanted


def _number(accepts: Callable[[float], bool], wanted: str) -> tuple[Callable[[Any], bool], str]:
    return lambda value: type(value) in (int, float) and math.isfinite(value) and accepts(value), wanted


COUNT = _whole(1)
ZERO_OR_MORE = _whole(0)
SEED = _whole(0, 2**32 - 1)
POSITIVE = _number(lambda value: value > 0, "a number > 0")
NOT_NEGATIVE = _number(lambda value: value >= 0, "a number >= 0")
SHARE = _number(lambda value: 0 <= value < 1, "a number from 0 to less than 1")
SWITCH = (lambda value: type(value) is bool, "true or false")
TEXT = (lambda value: isinstance(value, str) and bool(value), "text")
#: A count of steps or batches, or a fraction of all.
INTERVAL = (
    lambda value: (type(value) is int and value >= 1) or (type(value) is float and 0 < value <= 1),
    "a whole number > 0, or a fraction such as 0.5",
)

#: What each setting must be. A "?" after a name: or null.
SETTINGS: dict[str, tuple[Callable[[Any], bool], str]] = {
    "trainer.devices": COUNT,
    "trainer.num_nodes": COUNT,
    "trainer.max_steps": COUNT,
    "trainer.log_every_n_steps": COUNT,
    "trainer.val_check_interval": INTERVAL,
    "trainer.limit_val_batches": INTERVAL,
    "trainer.num_sanity_val_steps": _whole(-1),
    "trainer.gradient_clip_val?": NOT_NEGATIVE,
    "exp_manager.resume_if_exists": SWITCH,
    "exp_manager.create_checkpoint_callback": SWITCH,
    "exp_manager.create_tensorboard_logger": SWITCH,
    "exp_manager.create_wandb_logger": SWITCH,
    "exp_manager.create_early_stopping_callback": SWITCH,
    "exp_manager.exp_dir?": TEXT,
    "exp_manager.explicit_log_dir?": TEXT,
    "exp_manager.early_stopping_callback_params.patience": ZERO_OR_MORE,
    "exp_manager.early_stopping_callback_params.min_delta": NOT_NEGATIVE,
    "exp_manager.checkpoint_callback_params.save_top_k": _whole(-1),
    "verbose": SWITCH,
    "model.seed": SEED,
    "model.restore_from_path?": TEXT,
    "model.peft.restore_from_path?": TEXT,
    "model.tensor_model_parallel_size": COUNT,
    "model.pipeline_model_parallel_size": COUNT,
    "model.context_parallel_size?": COUNT,
    "model.expert_model_parallel_size?": COUNT,
    "model.sequence_parallel": SWITCH,
    "model.answer_only_loss": SWITCH,
    "model.megatron_amp_O2": SWITCH,
    "model.hidden_dropout": SHARE,
    "model.attention_dropout": SHARE,
    "model.ffn_dropout": SHARE,
    "model.activations_checkpoint_num_layers?": COUNT,
    "model.peft.lora_tuning.adapter_dim": COUNT,
    "model.peft.lora_tuning.adapter_dropout": SHARE,
    "model.peft.adapter_tuning.adapter_dim": COUNT,
    "model.peft.adapter_tuning.adapter_dropout": SHARE,
    "model.peft.p_tuning.virtual_tokens": COUNT,
    "model.peft.p_tuning.bottleneck_dim": COUNT,
    "model.data.chat": SWITCH,
    "model.optim.lr": POSITIVE,
    "model.optim.weight_decay": NOT_NEGATIVE,
    "model.optim.sched.warmup_steps?": ZERO_OR_MORE,
    "model.optim.sched.constant_steps?": ZERO_OR_MORE,
    "model.optim.sched.max_steps?": COUNT,
    "model.optim.sched.min_lr": NOT_NEGATIVE,
}
#: The same for every data section.
DATA_SETTINGS = {
    "shuffle": SWITCH,
    "drop_last": SWITCH,
    "add_bos": SWITCH,
    "add_eos": SWITCH,
    "add_sep": SWITCH,
    "global_batch_size": COUNT,
    "micro_batch_size": COUNT,
    "max_seq_length": COUNT,
    "min_seq_length": ZERO_OR_MORE,
    "num_workers": ZERO_OR_MORE,
    "memmap_workers?": COUNT,
    "tokens_to_generate": COUNT,
    "index_mapping_dir?": TEXT,
    "write_predictions_to_file": SWITCH,
    "output_file_path_prefix?": TEXT,
}
#: Names to choose from. A "?" after a setting: or null.
CHOICES = {
    "trainer.precision": PRECISIONS,
    "trainer.accelerator": ACCELERATORS,
    "model.optim.name": OPTIMIZERS,
    "model.optim.sched.name": SCHEDULES,
    "model.activations_checkpoint_granularity?": GRANULARITIES,
    "model.activations_checkpoint_method?": RECOMPUTE_METHODS,
    "exp_manager.checkpoint_callback_params.mode": ("min", "max"),
    "exp_manager.early_stopping_callback_params.mode": ("min", "max"),
}
#: Sections that a job cannot do without.
MAPPINGS = (
    "trainer", "exp_manager", "model", "model.peft", "model.optim", "model.data", "model.data.train_ds",
    "model.data.validation_ds", "model.data.validation_ds.metric",
)  # fmt: skip


def check_outline(cfg: DictConfig) -> None:
    """Check, before a config is resolved, that the sections are there that others refer to.

    Raises:
        UsageError: for the first one that is not.
    """
    for name in MAPPINGS:
        _section(cfg, name)


def check_settings(cfg: DictConfig) -> None:
    """Check what can be said of a resolved config's single settings and of a few together, whatever the base.

    Raises:
        UsageError: for the first thing that is wrong.
    """
    for name, (accepts, wanted) in SETTINGS.items():
        _check(cfg, name, accepts, wanted)
    for name, choices in CHOICES.items():
        value = _value(cfg, name.removesuffix("?"))
        if value is not _ABSENT and not (name.endswith("?") and value is None):
            check_choice(name.removesuffix("?"), str(value), choices)
    _check_name(cfg.exp_manager.get("name"))
    _check_filename(_value(cfg, "exp_manager.checkpoint_callback_params.filename"))
    _check_schedule(cfg)
    ranks = _check_ranks(cfg)
    for split in ("train_ds", "validation_ds", "test_ds"):
        if cfg.model.data.get(split) is None:
            continue
        section = _section(cfg, f"model.data.{split}")
        if split == "test_ds" and section.get("file_names") is None:
            continue  # not used
        for name, (accepts, wanted) in DATA_SETTINGS.items():
            _check(cfg, f"model.data.{split}.{name}", accepts, wanted)
        _check_batches(section, f"model.data.{split}", ranks)
        if split == "train_ds":
            _check_weights(section)
        else:
            _check_evaluation(section, f"model.data.{split}")
    _check_marks(cfg.model.data.get("chat_prompt_tokens"))


_ABSENT = object()


def _value(cfg: DictConfig, name: str) -> Any:
    value = cfg
    for part in name.split("."):
        if not isinstance(value, DictConfig) or part not in value:
            return _ABSENT
        value = value[part]
    return value


def _section(cfg: DictConfig, name: str) -> DictConfig:
    section = _value(cfg, name)
    if not isinstance(section, DictConfig):
        raise UsageError(name, None if section is _ABSENT else _plain(section), "must be a section of settings")
    return section


def _check(cfg: DictConfig, name: str, accepts: Callable[[Any], bool], wanted: str) -> None:
    optional, name = name.endswith("?"), name.removesuffix("?")
    value = _plain(_value(cfg, name))
    if value is _ABSENT or (optional and value is None) or accepts(value):
        return
    raise UsageError(name, value, f"must be {wanted}{', or null' if optional else ''}")


def _plain(value: Any) -> Any:
    return OmegaConf.to_container(value) if isinstance(value, DictConfig | ListConfig) else value


def _check_name(name: Any) -> None:
    field = "exp_manager.name"
    if not isinstance(name, str) or not name.strip():
        raise UsageError(field, _plain(name), "must be text: the run's folder and files are named so, e.g. run-7")
    if name in (".", "..") or any(not letter.isprintable() or letter in "/\\" for letter in name):
        raise UsageError(field, name, "names a folder and files: no slashes, line breaks or dots alone")


def _check_schedule(cfg: DictConfig) -> None:
    optim = cfg.model.optim
    betas = _plain(optim.get("betas"))
    if betas is not None and not (isinstance(betas, list) and len(betas) == 2 and all(map(SHARE[0], betas))):
        raise UsageError("model.optim.betas", betas, "must be two numbers from 0 to less than 1, e.g. [0.9, 0.98]")
    schedule = optim.get("sched")
    if schedule is None:
        return
    if not isinstance(schedule, DictConfig):
        raise UsageError("model.optim.sched", _plain(schedule), "must be a section of settings, or null")
    if (schedule.get("min_lr") or 0) > optim.get("lr", math.inf):
        raise UsageError("model.optim.sched.min_lr", schedule.min_lr, f"higher than model.optim.lr={optim.lr}")


def _check_ranks(cfg: DictConfig) -> int:
    """How many ranks share the rows of a step."""
    trainer, model = cfg.trainer, cfg.model
    world = trainer.get("devices", 1) * trainer.get("num_nodes", 1)
    started = os.environ.get("WORLD_SIZE") if "TORCHELASTIC_RUN_ID" in os.environ else None
    if started and int(started) != world:
        way_out = f"torchrun started {started} processes: devices times num_nodes must be that"
        raise UsageError("trainer.devices", trainer.devices, way_out)
    if trainer.get("accelerator") in ("gpu", "cuda", "auto"):
        check_gpus(trainer)
    names = ("tensor_model_parallel_size", "pipeline_model_parallel_size", "context_parallel_size")
    sizes = {name: model.get(name) or 1 for name in names}
    parallel = math.prod(sizes.values())
    if world % parallel:
        name = max(sizes, key=sizes.get)
        way_out = f"the parallel sizes need {parallel} processes, or a multiple; there are {world} (trainer.devices)"
        raise UsageError(f"model.{name}", sizes[name], way_out)
    return world // parallel


def check_gpus(trainer: DictConfig) -> None:
    """Raise ``UsageError`` for GPUs that are not here, in a trainer's config that asks for some."""
    import torch

    there, devices = torch.cuda.device_count(), trainer.get("devices")
    if not there and trainer.accelerator != "auto":
        raise UsageError("trainer.accelerator", trainer.accelerator, NO_GPU)
    if there and isinstance(devices, int) and devices > there:
        raise UsageError("trainer.devices", devices, f"there are {there} GPUs here")


def _check_batches(section: DictConfig, field: str, ranks: int) -> None:
    whole, piece = section.get("global_batch_size"), section.get("micro_batch_size")
    if whole and piece and whole % (piece * ranks):
        way_out = f"must be a multiple of micro_batch_size ({piece})"
        if ranks > 1:
            way_out += f" times the {ranks} data-parallel ranks"
        raise UsageError(f"{field}.global_batch_size", whole, way_out)


def _check_weights(section: DictConfig) -> None:
    field = "model.data.train_ds.concat_sampling_probabilities"
    weights, names = _plain(section.get("concat_sampling_probabilities")), section.get("file_names")
    if weights is None or not isinstance(names, ListConfig):
        return
    if not isinstance(weights, list) or len(weights) != len(names):
        raise UsageError(field, weights, f"must be a list of {len(names)}, a weight for each file, or null")
    if not all(map(POSITIVE[0], weights)):
        raise UsageError(field, weights, "every weight must be a number > 0; leave out files that are not wanted")


def _check_filename(filename: Any) -> None:
    """NeMo reads from a checkpoint's name how many rows its run has seen."""
    for part in ("{step}", "{consumed_samples}"):
        if isinstance(filename, str) and part not in filename:
            field = "exp_manager.checkpoint_callback_params.filename"
            raise UsageError(field, filename, f"must have {part} in it, from which a run continues")


def _check_evaluation(section: DictConfig, field: str) -> None:
    metric = section.get("metric")
    if not isinstance(metric, DictConfig):
        raise UsageError(f"{field}.metric", _plain(metric), "must be a section with a name, e.g. {name: loss}")
    check_choice(f"{field}.metric.name", metric.get("name"), METRICS)
    if section.get("write_predictions_to_file") and not section.get("output_file_path_prefix"):
        raise UsageError(f"{field}.output_file_path_prefix", None, "name where write_predictions_to_file is to write")
    names, files = _plain(section.get("names")), section.get("file_names")
    if names is not None and isinstance(files, ListConfig):
        if not isinstance(names, list) or len(names) != len(files) or not all(map(TEXT[0], names)):
            raise UsageError(f"{field}.names", names, f"must be a list of {len(files)} names, one for each file")
    longest, tokens = section.get("max_seq_length"), section.get("tokens_to_generate")
    if longest is not None and tokens is not None and tokens >= longest:
        way_out = f"no room for a prompt beside the {tokens} tokens of tokens_to_generate"
        raise UsageError(f"{field}.max_seq_length", longest, way_out)


def _check_marks(marks: Any) -> None:
    field = "model.data.chat_prompt_tokens"
    if marks is None:
        return
    if not isinstance(marks, DictConfig) or set(marks) != set(CHAT_PROMPT_TOKENS):
        raise UsageError(field, _plain(marks), f"must give {', '.join(CHAT_PROMPT_TOKENS)}")
    for name in CHAT_PROMPT_TOKENS:
        if not TEXT[0](marks[name]):
            raise UsageError(f"{field}.{name}", _plain(marks[name]), "must be text")
