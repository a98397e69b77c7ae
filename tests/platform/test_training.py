"""NeMo's own models, schemes, precisions and checkpoints on this machine."""

import pytest
import torch
import toy

TRAIN_ONLY = dict(limit_val_batches=0, val_check_interval=1, num_sanity_val_steps=0)


@pytest.mark.parametrize("scheme", toy.STOCK_SCHEMES)
def test_stock_scheme_trains(world, finetuning, scheme):
    options = dict(optim=toy.OPTIM | dict(lr=0.1)) if scheme == "ia3" else {}
    model, trainer, losses = toy.finetune(
        finetuning("gpt", scheme, **options), max_steps=10, val_check_interval=10, num_sanity_val_steps=0
    )
    assert sum(losses[-3:]) < sum(losses[:3]) - 1
    assert "validation_exact_string_match" in trainer.callback_metrics


@pytest.mark.parametrize("base", ["gpt", "llama"])
def test_base_survives_saving_and_restoring(world, toys, tmp_path, base):
    from nemo.collections.nlp.models.language_modeling.megatron_gpt_model import MegatronGPTModel

    config = getattr(toy, f"{base}_config")(toys / "tokenizer.model")
    model = MegatronGPTModel(config, toy.trainer(config))
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(torch.randn_like(parameter))
    model.save_to(str(tmp_path / "base.nemo"))
    restored = MegatronGPTModel.restore_from(str(tmp_path / "base.nemo"), trainer=toy.trainer(config))
    assert restored.state_dict().keys() == model.state_dict().keys()
    for name, parameter in model.named_parameters():
        assert torch.equal(parameter, restored.get_parameter(name)), name


RECOMPUTE = dict(
    activations_checkpoint_granularity="full",
    activations_checkpoint_method="uniform",
    activations_checkpoint_num_layers=1,
)


@pytest.mark.parametrize("precision", [32, "bf16-mixed"])
def test_recomputation_changes_nothing(world, finetuning, precision):
    def train(**overrides):
        config = finetuning("llama", "lora-all", **overrides)
        config.trainer.precision = precision
        model, _, losses = toy.finetune(config, max_steps=3, **TRAIN_ONLY)
        return losses, {name: p.detach() for name, p in model.named_parameters() if p.requires_grad}

    losses, adapters = train()
    recomputed_losses, recomputed = train(**RECOMPUTE)
    assert recomputed_losses == losses
    assert adapters.keys() == recomputed.keys()
    for name, adapter in adapters.items():
        assert torch.equal(adapter, recomputed[name]), name


@pytest.mark.parametrize("optimizer", ["adamw", "fused_adam", "mcore_distributed_optim"])
def test_main_weights_in_float32(world, finetuning, optimizer):
    options = dict(megatron_amp_O2=True, optim=toy.OPTIM | dict(name=optimizer))
    config = finetuning("llama", "lora-all", **options)
    config.trainer.precision = "bf16"
    model, _, losses = toy.finetune(config, max_steps=6, **TRAIN_ONLY)
    assert next(model.parameters()).dtype is torch.bfloat16
    assert losses[-1] < losses[0] - 0.3


@pytest.mark.parametrize(
    "scheme, optimizer, precision",
    [("lora", "fused_adam", 32), ("none", "adamw", 32), ("none", "mcore_distributed_optim", "bf16")],
)
def test_interrupted_run_resumes(world, finetuning, tmp_path, scheme, optimizer, precision):
    import lightning.pytorch as pl
    from nemo.utils.exp_manager import exp_manager
    from omegaconf import OmegaConf

    checkpoints = dict(
        monitor="validation_loss", mode="min", save_top_k=1, model_parallel_size=1, save_nemo_on_train_end=True
    )
    experiment = OmegaConf.create(
        dict(
            explicit_log_dir=str(tmp_path / "run"),
            create_tensorboard_logger=False,
            resume_if_exists=True,
            resume_ignore_no_checkpoint=True,
            create_checkpoint_callback=True,
            checkpoint_callback_params=checkpoints,
            log_step_timing=False,
        )
    )

    class StopAt(pl.Callback):
        def __init__(self, step):
            self.step, self.state = step, None

        def on_train_start(self, trainer, model):
            self.started_at = trainer.global_step
            self.parameters = {name: p.detach().clone() for name, p in model.named_parameters()}

        def on_train_batch_end(self, trainer, *args):
            trainer.should_stop = trainer.global_step >= self.step

    def run(until):
        options = dict(optim=toy.OPTIM | dict(name=optimizer), megatron_amp_O2=precision == "bf16")
        config = finetuning("llama", scheme, **options)
        config.trainer.precision = precision
        trainer = toy.trainer(config.model, max_steps=8, val_check_interval=4, precision=precision)
        exp_manager(trainer, experiment)
        stop = StopAt(until)
        trainer.callbacks.append(stop)
        model = toy.finetuning_model(config, trainer)
        trainer.fit(model)
        return stop, model

    first, trained = run(until=4)
    resumed, model = run(until=8)
    assert (first.started_at, resumed.started_at) == (0, 4)
    for name, parameter in trained.named_parameters():
        assert torch.equal(resumed.parameters[name], parameter), name
    optimizer = model.optimizers(use_pl_optimizer=False)
    optimizer = getattr(optimizer, "mcore_optimizer", optimizer)
    steps = [int(group["step"]) for group in optimizer.param_groups if "step" in group]
    steps += [int(state["step"]) for state in vars(optimizer).get("state", {}).values() if "step" in state]
    assert set(steps) == {8}
    assert list((tmp_path / "run").rglob("*.nemo"))


def test_generation_with_a_cache_agrees_with_plain_forwards(world, toys):
    from nemo.collections.nlp.models.language_modeling.megatron_gpt_model import MegatronGPTModel
    from nemo.collections.nlp.modules.common.text_generation_utils import (
        get_default_length_params,
        get_default_sampling_params,
    )

    trainer = toy.trainer(toy.llama_config(toys / "tokenizer.model"))
    model = MegatronGPTModel.restore_from(str(toys / "llama.nemo"), trainer=trainer)
    model.freeze()
    prompts = ["what is 3 plus 4?", "what is 10 plus 1?"]
    length = get_default_length_params() | dict(max_length=6)
    generated = model.generate(prompts, length, get_default_sampling_params() | dict(use_greedy=True, add_BOS=False))

    for prompt, tokens in zip(prompts, generated["token_ids"], strict=True):
        greedy = model.tokenizer.text_to_ids(prompt)
        while len(greedy) < len(tokens):
            positions = torch.arange(len(greedy))[None]
            mask = torch.ones(1, 1, len(greedy), len(greedy)).triu(1).bool()
            greedy.append(model.model(torch.tensor([greedy]), positions, mask)[0, -1].argmax().item())
        assert tokens == greedy
