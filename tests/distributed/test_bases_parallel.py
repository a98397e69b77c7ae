"""Bases of other forms on two tensor-parallel ranks: losses and tensors are those of a single process."""

import bases
import pytest
import torch
import toy
import world

from nemo_tiedlora import platform

RANK, STEPS = 5, 6
OPTIM = toy.OPTIM | {"eps": 1e-4}  # as in test_layouts: what differs by rounding goes on to differ by rounding
ATTENTION = ["attention_q", "attention_k", "attention_v", "attention_dense"]
TP2 = {"tensor_model_parallel_size": 2}
#: Megatron trains experts on several tensor-parallel ranks under sequence parallelism only.
CASES = {"experts": TP2 | {"sequence_parallel": True}, "heads": TP2, "gpt2": TP2}
CASES["shared expert"] = CASES["experts"]


def case(scheme, targets, **settings):
    settings = {"rank": RANK, "target_modules": targets} | settings
    peft = {"peft_scheme": scheme, f"{scheme}_tuning": settings}
    return {"peft": peft, "steps": STEPS, "model": {"optim": OPTIM}}


@pytest.fixture(scope="module")
def files(tmp_path_factory):
    folder = tmp_path_factory.mktemp("toy")
    with platform.host(), toy.clean_megatron():
        tokenizer = toy.tokenizer(folder)
        yield toy.rows(folder) | {"tokenizer": tokenizer}


@pytest.mark.parametrize(
    "base", [pytest.param(base, marks=[] if base == "experts" else [pytest.mark.thorough]) for base in CASES]
)
def test_two_ranks_train_what_one_trains(files, tmp_path, base):
    """And one goes on from the checkpoint that two have written."""
    middle = str(tmp_path / f"step={STEPS // 2}-consumed_samples={4 * STEPS // 2}.0.ckpt")  # NeMo reads the name
    mlp = ["mlp_fc1", "mlp_fc2"]
    cases = {
        "TL6 with DoRA": case("tied_lora", [*ATTENTION, *mlp], dora=True) | {"checkpoint": (middle, STEPS // 2)},
        "CondLoRA": case("cond_lora", ["attention_qkv", "attention_dense", *mlp]),
    }
    own = files | {"base": bases.save(base, files["tokenizer"], tmp_path)}
    two = world.run(tmp_path / "two", cases, own, 2, CASES[base])
    cases["TL6 with DoRA"].pop("checkpoint")
    resumed = cases["TL6 with DoRA"] | {"resume": middle}
    one = world.run(tmp_path / "one", cases | {"resumed": resumed}, own, 1, {})
    for name in cases:
        (reference,) = one[name]
        for rank in two[name]:
            assert rank["losses"] == pytest.approx(reference["losses"], rel=1e-5)
            assert rank["grad_norms"] == pytest.approx(reference["grad_norms"], rel=5e-5)
    (whole,), (rest,) = one["TL6 with DoRA"], one["resumed"]
    assert rest["losses"] == pytest.approx(whole["losses"][STEPS // 2 :], rel=1e-5)
    for key, tensor in whole["tensors"].items():
        torch.testing.assert_close(rest["tensors"][key], tensor, rtol=1e-4, atol=2e-5)
