"""Adapters of matrices inside fused weights, against the matrices that Megatron-core itself takes from the weight; and
NeMo's own, gathered from parts that are cut as it cuts them."""

import io
import tarfile

import fused
import pytest
import torch
from omegaconf import OmegaConf

from nemo_tiedlora.checkpoint.legacy import convert
from nemo_tiedlora.checkpoint.merge import Changes

QKV, FC1 = "self_attention.linear_qkv", "mlp.linear_fc1"
#: Heads, query groups and the size of a head; hidden size 32.
ATTENTIONS = {"GQA": (8, 2, 4), "MHA": (4, 4, 8), "wider heads": (4, 2, 10)}


@pytest.fixture(params=ATTENTIONS)
def attention(request):
    return ATTENTIONS[request.param]


def shape_of(attention):
    return dict(zip(("num_attention_heads", "num_query_groups", "kv_channels"), attention, strict=True))


def weight(out, of=32):
    return torch.randn(out, of, generator=torch.Generator().manual_seed(3))


def separate(path, whole, attention):
    """The matrices inside a fused weight, by target."""
    if path == QKV:
        return {f"attention_{part}": rows for part, rows in fused.queries_keys_values(whole, *attention).items()}
    return {f"mlp_{part}": rows for part, rows in fused.gate_up(whole).items()}


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("path", [QKV, FC1])
@pytest.mark.parametrize("adapted", [1, None], ids=["one", "all"])
def test_merging_changes_the_matrices_that_are_adapted_each_by_its_own_factors(make, attention, path, adapted, dtype):
    heads, groups, head_dim = attention
    whole = weight((heads + 2 * groups) * head_dim if path == QKV else 128).to(dtype)
    before = separate(path, whole, attention)
    for first in range(len(before)):
        targets = sorted(before)[first:][:adapted]
        adapter = make(preset="LoRA", alpha=2.0, target_modules=targets, shape=shape_of(attention))
        changes = Changes(adapter)
        merged = changes.apply(path, 1, whole)
        for target, found in separate(path, merged, attention).items():
            expected = before[target]
            if target in targets:
                A, B = (adapter.tensors[f"{target}.1.{part}"].double() for part in "AB")
                expected = (expected.double() + 2.0 / 4 * B @ A).to(dtype)
                tolerance = 4 * torch.finfo(dtype).eps
                torch.testing.assert_close(found, expected, rtol=tolerance, atol=1e-6)
            else:
                assert torch.equal(found, expected), target
        tolerance = 8 * torch.finfo(dtype).eps * float(merged.abs().max())
        torch.testing.assert_close(changes.undo(path, 1, merged), whole, rtol=0, atol=tolerance)


def test_lengths_of_rows_are_those_of_the_matrix_inside(make):
    attention = ATTENTIONS["GQA"]
    adapter = make(preset="LoRA", dora=True, target_modules=["attention_k"], shape=shape_of(attention))
    before = separate(QKV, weight(48), attention)
    merged = separate(QKV, Changes(adapter).apply(QKV, 0, weight(48)), attention)
    A, B, m = (adapter.tensors[f"attention_k.0.{part}"] for part in ("A", "B", "m"))
    directions = torch.nn.functional.normalize(before["attention_k"] + B @ A, dim=1)
    torch.testing.assert_close(merged["attention_k"], m[:, None] * directions, rtol=1e-4, atol=1e-5)
    for target in ("attention_q", "attention_v"):
        assert torch.equal(merged[target], before[target])


#: NeMo's name of an adapter, and the axis along which it cuts its A. Its B is cut along ``out``; a gated fc1's has gate
#: and up on every rank, as the layer that its outputs are added to.
NEMOS = {
    "attention_qkv": ("self_attention.adapter_layer.lora_kqv_adapter", 0),
    "attention_dense": ("self_attention.adapter_layer.lora_dense_attention_adapter", 1),
    "mlp_fc1": ("mlp.adapter_layer.lora_hto4h_adapter", 0),
    "mlp_fc2": ("mlp.adapter_layer.lora_4htoh_adapter", 1),
}


@pytest.mark.parametrize("activation", ["fast-swiglu", "gelu"])
@pytest.mark.parametrize(("ranks", "stages"), [(1, 1), (2, 1), (1, 2), (2, 2), (4, 2)])
def test_nemos_lora_is_gathered_from_all_ranks_and_stages(make, tmp_path, ranks, stages, activation):
    expected = make(preset="LoRA", target_modules=["all"], shape={"activation": activation, "num_query_groups": None})
    config = {
        "mcore_gpt": True,
        "encoder_seq_length": 64,
        **expected.base.shape,
        "peft": {
            "peft_scheme": "lora",
            "lora_tuning": {"variant": "nemo", "adapter_dim": 4, "alpha": 4, "target_modules": ["all"]},
        },
    }
    members = {"model_config.yaml": OmegaConf.to_yaml(OmegaConf.create(config)).encode()}
    for stage in range(stages):
        for rank in range(ranks):
            state = {}
            for key, tensor in expected.tensors.items():
                target, layer, part = key.split(".")
                below, axis = NEMOS[target]
                if int(layer) // (4 // stages) == stage:
                    gated = (target, part, activation) == ("mlp_fc1", "B", "fast-swiglu")
                    name = f"model.decoder.layers.{int(layer) % (4 // stages)}.{below}"
                    mine = fused.held(tensor, 0 if part == "B" else axis, rank, ranks, gated)
                    state[f"{name}.linear_{'out' if part == 'B' else 'in'}.weight"] = mine
            folder = f"tp_rank_{rank:02d}_pp_rank_{stage:03d}/" if stages > 1 else f"mp_rank_{rank:02d}/"
            buffer = io.BytesIO()
            torch.save(state, buffer)
            members[f"{folder if ranks * stages > 1 else ''}model_weights.ckpt"] = buffer.getvalue()
    with tarfile.open(tmp_path / "theirs.nemo", "w") as tar:
        for name, content in members.items():
            info = tarfile.TarInfo(f"./{name}")
            info.size = len(content)
            tar.addfile(info, io.BytesIO(content))
    found = convert(tmp_path / "theirs.nemo").tensors
    assert found.keys() == expected.tensors.keys()
    for key, tensor in expected.tensors.items():
        assert torch.equal(found[key], tensor), key
