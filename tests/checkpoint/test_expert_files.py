"""Adapters inside experts and bases of experts as files, without NeMo."""

import io

import pytest
import torch
from omegaconf import OmegaConf
from test_merge import pack, unknown
from typer.testing import CliRunner

from nemo_tiedlora import cli
from nemo_tiedlora.checkpoint import write
from nemo_tiedlora.checkpoint.base import open_base
from nemo_tiedlora.checkpoint.merge import merge, unmerge
from nemo_tiedlora.errors import UsageError

EXPERTS, WIDTH, HIDDEN, LAYERS = 11, 12, 32, 4
SHAPE = {"num_moe_experts": EXPERTS, "moe_ffn_hidden_size": WIDTH}
KEY = "model.decoder.layers.{}.mlp.experts.local_experts.{}.linear_{}.weight"


def base_of(adapter, path, numbers=range(EXPERTS)):
    """A single-file base with random weights of its experts; returns them too."""
    model = OmegaConf.create({"mcore_gpt": True, **adapter.base.shape})
    draw = torch.Generator().manual_seed(7)
    sizes = {"fc1": (2 * WIDTH, HIDDEN), "fc2": (HIDDEN, WIDTH)}
    state = {
        KEY.format(layer, number, name): torch.randn(size, generator=draw)
        for layer in range(LAYERS)
        for number in numbers
        for name, size in sizes.items()
    }
    buffer = io.BytesIO()
    torch.save(state, buffer)
    members = {"model_config.yaml": OmegaConf.to_yaml(model).encode(), "model_weights.ckpt": buffer.getvalue()}
    return pack(path, members), state


@pytest.fixture
def adapter(make):
    """TL6 on the gate and the second projection of every expert."""
    return unknown(make(shape=SHAPE, preset="TL6", alpha=2.0, target_modules=["mlp_gate", "mlp_fc2"]))


def test_every_expert_is_merged_with_factors_of_its_own(adapter, tmp_path):
    write(adapter, tmp_path / "a")
    base, state = base_of(adapter, tmp_path / "base.nemo")
    assert merge(base, tmp_path / "a", tmp_path / "merged.nemo")["layers"] == LAYERS * EXPERTS * 2
    named = {key: tensor.double() for key, tensor in adapter.tensors.items()}
    with open_base(tmp_path / "merged.nemo") as merged:
        for layer in range(LAYERS):
            for number in range(EXPERTS):
                for name, kind in (("fc1", f"mlp_gate_expert_{number}"), ("fc2", f"mlp_fc2_expert_{number}")):
                    B = named[f"{kind}.{layer}.v"][:, None] * named[f"{kind}.B"]
                    A = named[f"{kind}.{layer}.u"][:, None] * named[f"{kind}.A"]
                    expected = state[KEY.format(layer, number, name)].double()
                    expected[: len(B)] += 0.5 * B @ A  # the gate is the first half of fc1
                    found = merged.weight(f"mlp.experts.local_experts.{number}.linear_{name}", layer)
                    torch.testing.assert_close(found, expected.float(), rtol=1e-6, atol=1e-6)
    unmerge(tmp_path / "merged.nemo", tmp_path / "a", tmp_path / "back.nemo")
    with open_base(tmp_path / "back.nemo") as back:
        for key, weight in state.items():
            torch.testing.assert_close(back.state[key], weight, rtol=0, atol=1e-5)


def test_checksums_tell_experts_apart(adapter, tmp_path):
    base, _ = base_of(adapter, tmp_path / "base.nemo")
    with open_base(base) as opened:
        found = opened.checksums(adapter.paths)
    assert len(adapter.paths) == len(set(found.values())) == 2 * EXPERTS


def test_a_base_without_one_of_its_experts_is_refused(adapter, tmp_path):
    write(adapter, tmp_path / "a")
    base, _ = base_of(adapter, tmp_path / "base.nemo", numbers=range(1, EXPERTS))
    with pytest.raises(UsageError, match=r"no decoder\.layers\.mlp\.experts\.local_experts\.0\.linear_fc1\.weight of"):
        merge(base, tmp_path / "a", tmp_path / "merged.nemo")
    assert not (tmp_path / "merged.nemo").exists()


def test_nemos_lora_is_not_written_without_what_is_inside_experts(adapter, tmp_path):
    write(adapter, tmp_path / "a")
    base, _ = base_of(adapter, tmp_path / "base.nemo")
    out = tmp_path / "out.nemo"
    command = ["export", str(tmp_path / "a"), "--base", str(base), "--format", "nemo-lora", "--out", str(out)]
    with pytest.raises(UsageError, match=r"^format='nemo-lora': NeMo's LoRA has no layers inside experts; merge"):
        CliRunner().invoke(cli.app, command, catch_exceptions=False)
    assert not out.exists()
