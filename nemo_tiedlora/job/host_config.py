"""What NeMo must be told to hold a base on one device, where no config of a job says it."""

from typing import Any

from omegaconf import DictConfig, OmegaConf

TRAINER = {
    "devices": 1, "num_nodes": 1, "accelerator": "auto", "logger": False, "enable_checkpointing": False,
    "use_distributed_sampler": False, "max_epochs": 9999, "max_steps": 1, "log_every_n_steps": 1,
    "val_check_interval": 1, "num_sanity_val_steps": 0, "gradient_clip_val": 1.0,
}  # fmt: skip
MODEL = {
    "seed": 1234, "tensor_model_parallel_size": 1, "pipeline_model_parallel_size": 1, "sequence_parallel": False,
    "micro_batch_size": 1, "global_batch_size": 1, "sync_batch_comm": False, "answer_only_loss": True,
    "gradient_as_bucket_view": False, "activations_checkpoint_granularity": None,
    "activations_checkpoint_method": None, "activations_checkpoint_num_layers": None,
    "activations_checkpoint_layers_per_pipeline": None, "save_nemo_on_validation_end": False,
    "resume_from_checkpoint": None, "hidden_dropout": 0.0, "attention_dropout": 0.0, "ffn_dropout": 0.0,
    "megatron_amp_O2": False, "optim": {"name": "fused_adam", "lr": 0.0}, "data": {},
    "peft": {"peft_scheme": "none", "restore_from_path": None},
}  # fmt: skip


def host_config(precision: str | int = 32, **model: Any) -> DictConfig:
    """A config with ``trainer``, ``exp_manager`` and ``model``.

    Args:
        precision: 32, bf16 or 16.
        model: what is another than in ``MODEL``.
    """
    precise = 32 if precision == "32" else precision
    manager = {"name": None, "log_tflops_per_sec_per_gpu": False}  # without a name nothing is logged or kept
    return OmegaConf.create(
        {"trainer": TRAINER | {"precision": precise}, "exp_manager": manager, "model": MODEL | model}
    )
