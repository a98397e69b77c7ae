"""Tied-LoRA inside NeMo: real Megatron layers, real training, real ``.nemo`` files."""

import subprocess
import sys
import tarfile

import pytest
import torch
import toy

from nemo_tiedlora.errors import UsageError

CHUNK = 24


def logits(model):
    """(1, CHUNK, vocabulary) of fixed tokens."""
    tokens = torch.arange(5, 5 + CHUNK)[None]
    positions = torch.arange(CHUNK)[None]
    chunk = model.model.module if model.cfg.megatron_amp_O2 else model.model
    chunk.eval()
    with torch.no_grad():
        return chunk(tokens, positions, None)


def adapters(model):
    return {
        name: module.get_adapter_module("tied_lora_attention_qkv")
        for name, module in model.named_modules()
        if name.endswith("linear_qkv")
    }


@pytest.mark.parametrize("base", ["llama", "gpt"])
def test_a_new_tl6_adapter_gives_exactly_the_base_logits(finetuning, base):
    plain, _ = finetuning(base, peft_scheme="none")
    adapted, _ = finetuning(base, peft_scheme="tied_lora", tied_lora_tuning={"preset": "TL6", "rank": 4})
    assert torch.equal(logits(adapted), logits(plain))


def test_the_adapted_logits_are_those_of_the_merged_weight(finetuning):
    model, _ = finetuning(peft_scheme="tied_lora", tied_lora_tuning={"rank": 4, "alpha": 6})
    with torch.no_grad():
        for adapter in adapters(model).values():
            for parameter in adapter.parameters():
                parameter.add_(torch.randn_like(parameter))
    adapted = logits(model)
    shared = next(iter(adapters(model).values()))
    for name, adapter in adapters(model).items():
        linear = model.get_submodule(name)
        delta = 6 / 4 * (adapter.v[:, None] * shared.B) @ (adapter.u[:, None] * shared.A)
        linear.weight.data += delta
        linear.set_enabled_adapters(enabled=False)
    torch.testing.assert_close(logits(model), adapted, rtol=1e-4, atol=1e-4)


def test_disabling_the_adapter_gives_the_base_back(finetuning):
    model, _ = finetuning(peft_scheme="tied_lora", tied_lora_tuning={"preset": "TL1", "rank": 4})
    plain, _ = finetuning(peft_scheme="none")
    assert not torch.equal(logits(model), logits(plain))
    for name in adapters(model):
        model.get_submodule(name).set_enabled_adapters(enabled=False)
    assert torch.equal(logits(model), logits(plain))
    for name in adapters(model):
        model.get_submodule(name).set_enabled_adapters(enabled=True)
    assert not torch.equal(logits(model), logits(plain))


@pytest.mark.parametrize("preset", ["LoRA", "TL1", "TL2", "TL3", "TL4", "TL5", "TL6", "VeRA"])
def test_training_moves_the_trained_parts_only(finetuning, preset):
    model, trainer = finetuning(
        peft_scheme="tied_lora", tied_lora_tuning={"preset": preset, "rank": 4}, trainer={"max_steps": 24}
    )
    before = {name: tensor.clone() for name, tensor in [*model.named_parameters(), *model.named_buffers()]}
    losses = losses_of(model, trainer)
    trained = {name for name, parameter in model.named_parameters() if parameter.requires_grad}
    assert trained == model.adapter_keys
    for name, tensor in [*model.named_parameters(), *model.named_buffers()]:
        assert torch.equal(tensor, before[name]) is (name not in trained), name
    assert sum(losses[-8:]) < sum(losses[:8])


def losses_of(model, trainer):
    from lightning.pytorch import Callback

    losses = []

    class Record(Callback):
        def on_train_batch_end(self, trainer, model, *_):
            losses.append(float(trainer.callback_metrics["reduced_train_loss"]))

    trainer.callbacks.append(Record())
    trainer.fit(model)
    return losses


def test_the_trained_parameters_are_the_counted_ones(finetuning):
    from nemo_tiedlora.variants import Site, TiedConfig, build, count

    model, _ = finetuning(peft_scheme="tied_lora", tied_lora_tuning={"rank": 4})
    sites = [Site("attention_qkv", layer, 32, 64) for layer in range(4)]
    sizes = {name: p.numel() for name, p in model.named_parameters() if name in model.adapter_keys}
    assert sum(sizes.values()) == count(build(TiedConfig(rank=4)), sites).trainable


def test_layer_selection_adapts_the_named_layers_only(finetuning):
    model, _ = finetuning(peft_scheme="tied_lora", tied_lora_tuning={"rank": 4, "layer_selection": [2, 4]})
    layers = {name.split(".layers.")[1][0] for name in model.adapter_keys}
    assert layers == {"1", "3"}


@pytest.mark.parametrize("preset", ["TL6", "VeRA"])
def test_a_saved_adapter_gives_identical_logits_in_a_fresh_process(finetuning, files, tmp_path, preset):
    model, _ = finetuning(peft_scheme="tied_lora", tied_lora_tuning={"preset": preset, "rank": 4})
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if name in model.adapter_keys:
                parameter.add_(0.3 * torch.randn_like(parameter))
    model.setup_complete = True  # from here on NeMo saves the adapter, not the model
    model.save_to(str(tmp_path / "adapter.nemo"))
    with tarfile.open(tmp_path / "adapter.nemo") as archive:
        weights = next(member for member in archive if member.name.endswith("model_weights.ckpt"))
        assert set(torch.load(archive.extractfile(weights))) == model.adapter_keys
    torch.save(logits(model), tmp_path / "expected.pt")
    code = """
import sys, torch
from nemo_tiedlora.nemo.generate import generator
base, adapter, expected, chunk = sys.argv[1:]
with generator(base, adapter) as loaded:
    tokens, positions = torch.arange(5, 5 + int(chunk))[None], torch.arange(int(chunk))[None]
    with torch.no_grad():
        same = torch.equal(loaded.model.model(tokens, positions, None), torch.load(expected))
    print(list(loaded.generate(["what is 1 plus 2?"], 3)))
sys.exit(0 if same else 1)
"""
    arguments = [files["llama"], tmp_path / "adapter.nemo", tmp_path / "expected.pt", CHUNK]
    done = subprocess.run(
        [sys.executable, "-c", code, *map(str, arguments)], env=toy.FRESH, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr[-2000:]


def test_bf16_trains(finetuning):
    for o2 in (False, True):
        model, trainer = finetuning(
            peft_scheme="tied_lora",
            tied_lora_tuning={"rank": 4},
            trainer={"max_steps": 24, "precision": "bf16"},
            model={"megatron_amp_O2": o2},
        )
        losses = losses_of(model, trainer)
        assert sum(losses[-8:]) < sum(losses[:8])


def test_full_recomputation_gives_the_same_training(finetuning):
    ends = []
    for granularity in (None, "full"):
        recompute = {
            "activations_checkpoint_granularity": granularity,
            "activations_checkpoint_method": "uniform" if granularity else None,
            "activations_checkpoint_num_layers": 1 if granularity else None,
        }
        model, trainer = finetuning(
            peft_scheme="tied_lora", tied_lora_tuning={"rank": 4}, trainer={"max_steps": 6}, model=recompute
        )
        trainer.fit(model)
        ends.append({name: p.detach().clone() for name, p in model.named_parameters() if name in model.adapter_keys})
    for name, value in ends[0].items():
        torch.testing.assert_close(ends[1][name], value, rtol=1e-4, atol=1e-5)


def test_a_pipeline_parallel_layout_is_refused(finetuning):
    from omegaconf import OmegaConf

    from nemo_tiedlora.nemo.peft_config import FactorPEFTConfig

    model, _ = finetuning(peft_scheme="none")
    cfg = OmegaConf.create(OmegaConf.to_container(model.cfg))
    cfg.pipeline_model_parallel_size = 2
    with pytest.raises(UsageError, match="pipeline_model_parallel_size=2"):
        FactorPEFTConfig("tied_lora", cfg)


def test_registering_twice_changes_nothing(host):
    from nemo.collections.nlp.parts.mixins.nlp_adapter_mixins import NLPAdapterModelMixin
    from nemo.collections.nlp.parts.peft_config import PEFT_CONFIG_MAP

    from nemo_tiedlora import register

    before = dict(PEFT_CONFIG_MAP), NLPAdapterModelMixin.__dict__["tie_weights"]
    register()
    assert (dict(PEFT_CONFIG_MAP), NLPAdapterModelMixin.__dict__["tie_weights"]) == before
    assert {"tied_lora", "vera", "lora", "none"} <= set(PEFT_CONFIG_MAP)
