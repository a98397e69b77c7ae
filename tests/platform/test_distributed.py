"""Two gloo processes train like one: layouts, sequence parallelism, clipping, shards of one base."""

import json
import os
from pathlib import Path

import forked
import pytest
import toy

STEPS = 4


def train(config):
    model, trainer, losses = toy.finetune(config, max_steps=STEPS, val_check_interval=STEPS, num_sanity_val_steps=0)
    return losses, float(trainer.callback_metrics["grad_norm"])


@pytest.mark.slow
@pytest.mark.parametrize(
    "scheme, layout",
    [
        ("lora-all", dict(tensor_model_parallel_size=2, sequence_parallel=True)),
        ("none", dict(pipeline_model_parallel_size=2)),
    ],
    ids=["tensor-and-sequence", "pipeline"],
)
def test_two_processes_train_like_one(world, finetuning, tmp_path, scheme, layout):
    from omegaconf import OmegaConf

    losses, norm = train(finetuning("llama", scheme))
    OmegaConf.save(finetuning("llama", scheme, **layout), tmp_path / "config.yaml")
    forked.ranks(2, worker, tmp_path)
    for rank in range(2):
        parallel_losses, parallel_norm = json.loads((tmp_path / f"{rank}.json").read_text())
        assert parallel_losses == pytest.approx(losses, abs=2e-4)
        assert parallel_norm == pytest.approx(norm, rel=1e-3)


def worker(folder: Path):
    from nemo_tiedlora import platform

    with platform.host():
        from omegaconf import OmegaConf

        result = train(OmegaConf.load(folder / "config.yaml"))
        (folder / f"{os.environ['RANK']}.json").write_text(json.dumps(result))
