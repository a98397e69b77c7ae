"""Merging into plain bases, without NeMo: against the equation, in half precision, and on damaged files."""

import io
import json
import os
import pickle
import tarfile

import pytest
import torch
from omegaconf import OmegaConf
from typer.testing import CliRunner

from nemo_tiedlora import cli
from nemo_tiedlora.checkpoint import write
from nemo_tiedlora.checkpoint.base import open_base
from nemo_tiedlora.checkpoint.merge import merge, unmerge
from nemo_tiedlora.errors import UsageError
from nemo_tiedlora.model.targets import TARGETS, shape

QKV = "self_attention.linear_qkv"


def pack(path, members):
    with tarfile.open(path, "w") as tar:
        for name, content in members.items():
            info = tarfile.TarInfo(f"./{name}")
            info.size = len(content)
            tar.addfile(info, io.BytesIO(content))
    return path


def base_of(adapter, path, dtype=torch.float32, scale=0.1):
    """A single-file base of the adapter's shape with random weights; returns them too."""
    model = OmegaConf.create({"mcore_gpt": True, **adapter.base.shape})
    draw = torch.Generator().manual_seed(7)
    state = {"model.decoder.final_layernorm.weight": torch.ones(32)}
    for target in ("attention_qkv", "attention_dense", "mlp_fc1", "mlp_fc2"):
        for layer in range(model.num_layers):
            size = shape(target, model)[::-1]
            key = f"model.decoder.layers.{layer}.{TARGETS[target].path}.weight"
            state[key] = (scale * torch.randn(size, generator=draw)).to(dtype)
    buffer = io.BytesIO()
    torch.save(state, buffer)
    members = {"model_config.yaml": OmegaConf.to_yaml(model).encode(), "model_weights.ckpt": buffer.getvalue()}
    return pack(path, members), state


def unknown(adapter):
    """The same adapter, of a base whose checksum nobody took."""
    from dataclasses import replace

    return replace(adapter, base=replace(adapter.base, checksums={}))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
def test_merged_weights_are_those_of_the_equation(make, tmp_path, dtype):
    adapter = unknown(make(preset="TL6", alpha=2.0))
    write(adapter, tmp_path / "a")
    path, state = base_of(adapter, tmp_path / "base.nemo", dtype)
    before = path.read_bytes()
    facts = merge(path, tmp_path / "a", tmp_path / "merged.nemo")
    assert facts["base_checksum"] == "not recorded" and path.read_bytes() == before
    named = adapter.tensors
    with open_base(tmp_path / "merged.nemo") as merged:
        assert set(merged.state) == set(state)
        for key, weight in state.items():
            expected = weight
            if QKV in key:
                layer = key.split(".")[3]
                B = named[f"attention_qkv.{layer}.v"][:, None] * named["attention_qkv.B"]
                A = named[f"attention_qkv.{layer}.u"][:, None] * named["attention_qkv.A"]
                expected = (weight.double() + 0.5 * B.double() @ A.double()).to(dtype)
                tolerance = dict(rtol=4 * torch.finfo(dtype).eps, atol=1e-6)
                torch.testing.assert_close(merged.state[key], expected, **tolerance)
            else:
                assert torch.equal(merged.state[key], expected)
    back = unmerge(tmp_path / "merged.nemo", tmp_path / "a", tmp_path / "back.nemo")
    with open_base(tmp_path / "back.nemo") as again:
        furthest = max(
            float((again.state[key].double() - weight.double()).abs().max()) for key, weight in state.items()
        )
    assert furthest == facts["unmerge_max_difference"] and back["exact"] is (furthest == 0)


def test_an_adapter_that_does_nothing_comes_out_bit_by_bit(make, tmp_path):
    from dataclasses import replace

    adapter = unknown(make(preset="LoRA"))
    adapter = replace(
        adapter, tensors={key: torch.zeros_like(t) if key.endswith("B") else t for key, t in adapter.tensors.items()}
    )
    write(adapter, tmp_path / "a")
    path, _ = base_of(adapter, tmp_path / "base.nemo", torch.bfloat16)
    assert merge(path, tmp_path / "a", tmp_path / "merged.nemo")["unmerge_max_difference"] == 0
    assert unmerge(tmp_path / "merged.nemo", tmp_path / "a", tmp_path / "back.nemo")["exact"] is True


def test_an_overflow_is_refused_and_leaves_nothing(make, tmp_path):
    adapter = unknown(make(preset="LoRA", alpha=1e6))
    write(adapter, tmp_path / "a")
    path, _ = base_of(adapter, tmp_path / "base.nemo", torch.float16)
    with pytest.raises(UsageError, match="linear_qkv of layer 0 would not be finite"):
        merge(path, tmp_path / "a", tmp_path / "merged.nemo")
    assert sorted(os.listdir(tmp_path)) == ["a", "base.nemo"]


class Evil:
    def __reduce__(self):
        return os.mkdir, ("/tmp/evil-was-here",)


def test_a_base_that_would_run_code_is_refused(make, tmp_path):
    adapter = unknown(make())
    write(adapter, tmp_path / "a")
    path, _ = base_of(adapter, tmp_path / "base.nemo")
    with tarfile.open(path) as tar:
        config = tar.extractfile("./model_config.yaml").read()
    buffer = io.BytesIO()
    torch.save({"model.decoder.layers.0.self_attention.linear_qkv.weight": Evil()}, buffer)
    bases = {
        "pieces.nemo": {"model_weights/.metadata": pickle.dumps(Evil())},
        "single.nemo": {"model_weights.ckpt": buffer.getvalue()},
        "zarr.nemo": {"model_weights/metadata.json": b"{}"},
        "list.nemo": {"model_weights/.metadata": pickle.dumps([1])},
        "text.nemo": {"model_weights.ckpt": b"hello"},
    }
    for name, members in bases.items():
        pack(tmp_path / name, {"model_config.yaml": config} | members)
        with pytest.raises(UsageError, match=name):
            merge(tmp_path / name, tmp_path / "a", tmp_path / "out.nemo")
    assert not os.path.exists("/tmp/evil-was-here") and not (tmp_path / "out.nemo").exists()


def test_a_base_cut_off_anywhere_is_refused(make, tmp_path):
    adapter = unknown(make())
    write(adapter, tmp_path / "a")
    path, _ = base_of(adapter, tmp_path / "base.nemo")
    whole = path.read_bytes()
    used = len(whole.rstrip(b"\0"))
    for part in range(12):
        path.write_bytes(whole[: used * part // 12])
        with pytest.raises(UsageError, match="base.nemo"):
            merge(path, tmp_path / "a", tmp_path / "out.nemo")
        assert sorted(os.listdir(tmp_path)) == ["a", "base.nemo"]


def test_the_command(make, tmp_path):
    adapter = unknown(make())
    write(adapter, tmp_path / "a")
    path, _ = base_of(adapter, tmp_path / "base.nemo")

    def command(out, *more):
        arguments = ["merge", "--base", path, "--adapter", tmp_path / "a", "--out", tmp_path / out, *more, "--json"]
        return CliRunner().invoke(cli.app, list(map(str, arguments)), catch_exceptions=False)

    assert json.loads(command("merged.nemo").output)["layers"] == 4
    for out, said in (("base.nemo", "would replace"), ("merged", "must end in .nemo")):
        with pytest.raises(UsageError, match=said):
            command(out)
    with pytest.raises(UsageError, match="no adapter was merged"):
        command("out.nemo", "--unmerge")
