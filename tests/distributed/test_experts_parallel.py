"""Adapters inside experts under every layout that such a base runs in: one logical model, as in one process."""

import itertools

import bases
import forked
import pytest
import torch
import toy
import world
from omegaconf import OmegaConf

from nemo_tiedlora import platform
from nemo_tiedlora.checkpoint import read
from nemo_tiedlora.checkpoint.base import open_base
from nemo_tiedlora.model.config import nemo_config

STEPS = 4
OPTIM = toy.OPTIM | {"eps": 1e-4}  # as in test_layouts: what differs by rounding goes on to differ by rounding
DISTRIBUTED = OPTIM | {"name": "mcore_distributed_optim", "average_in_collective": False}
SINGLE = ["mlp_gate", "mlp_up", "mlp_fc2"]


def case(scheme, optim=OPTIM, **settings):
    settings = {"rank": 5, "target_modules": ["mlp"]} | settings
    peft = {"peft_scheme": scheme, f"{scheme}_tuning": settings}
    return {"peft": peft, "steps": STEPS, "model": {"optim": optim}}


CASES = {
    "TL6 with DoRA": case("tied_lora", dora=True, target_modules=["all"]),
    "LoRA, distributed optimizer": case("tied_lora", DISTRIBUTED, preset="LoRA", target_modules=SINGLE),
    "VeRA": case("vera"),
    "ShareLoRA": case("share_lora", groups=[[1, 2]], train=["A", "B", "u", "v"], target_modules=SINGLE),
    "CondLoRA": case("cond_lora", layer_selection=[1, 2, 4]),
    "LoRA-XS": case("lora_xs", std_R=0.1),
    "Uni-LoRA": case("uni_lora", dimension=300, bound=0.2, target_modules=SINGLE),
    "DynaLoRA": case("dyna_lora", inner="tied_lora", importance="backward", period=2, target_modules=["all"]),
}
LAYOUTS = {
    "TP2 SP": (2, {"tensor_model_parallel_size": 2, "sequence_parallel": True}),
    "PP2": (2, {"pipeline_model_parallel_size": 2}),
    "DP2": (2, {}),
    "TP2 SP PP2": (
        4,
        {"tensor_model_parallel_size": 2, "sequence_parallel": True, "pipeline_model_parallel_size": 2},
    ),
}
#: Refused under sequence parallelism.
BACKWARD = "DynaLoRA"


@pytest.fixture(scope="module")
def files(tmp_path_factory):
    folder = tmp_path_factory.mktemp("toy")
    with platform.host(), toy.clean_megatron():
        return toy.rows(folder) | {"base": bases.save("experts", toy.tokenizer(folder), folder)}


@pytest.fixture(scope="module")
def alone(files, tmp_path_factory):
    """``alone(names)`` → what one process trains, each case once."""
    made = {}

    def train(names):
        missing = {name: CASES[name] for name in names if name not in made}
        if missing:
            made.update(world.run(tmp_path_factory.mktemp("alone") / "run", missing, files, 1, {}))
        return {name: made[name][0] for name in names}

    return train


@pytest.mark.thorough
@pytest.mark.parametrize("layout", LAYOUTS)
def test_ranks_train_and_save_what_one_process_trains(files, alone, tmp_path, layout):
    processes, overrides = LAYOUTS[layout]
    names = [name for name in CASES if name != BACKWARD or "SP" not in layout]
    saved = {name: tmp_path / f"{number}.nemo" for number, name in enumerate(names)}
    cases = {name: CASES[name] | {"save": str(saved[name])} for name in names}
    ranks, references = world.run(tmp_path / "run", cases, files, processes, overrides), alone(names)
    for name, reference in references.items():
        assert len(reference["grad_norms"]) == STEPS and min(reference["grad_norms"]) > 0
        assert ranks[name][0]["losses"] == pytest.approx(reference["losses"], rel=1e-5), name
        for rank in ranks[name]:
            assert rank["grad_norms"] == pytest.approx(reference["grad_norms"], rel=5e-5), name
            if "history" in reference:
                assert rank["history"]["active_steps"] == reference["history"]["active_steps"]
        for key, tensor in read(saved[name]).tensors.items():
            expected = reference["tensors"][key]
            torch.testing.assert_close(tensor, expected, rtol=1e-4, atol=2e-5, msg=lambda m, key=key: f"{key}: {m}")


def restored_and_saved(base, out, layout):
    """On one of two ranks: the base, as a file that both wrote."""
    with platform.host():
        from nemo.collections.nlp.models.language_modeling.megatron_gpt_model import MegatronGPTModel

        config = OmegaConf.create(nemo_config(base, "base") | layout)
        trainer = toy.trainer(config, devices=2, precision=config.precision)
        MegatronGPTModel.restore_from(str(base), config, trainer=trainer).save_to(str(out))


#: NeMo spreads experts over ranks in half precision only.
SPREAD = {"expert_model_parallel_size": 2, "megatron_amp_O2": True, "precision": "bf16"}


@pytest.mark.thorough
@pytest.mark.parametrize(
    "layout", [LAYOUTS["TP2 SP"][1], LAYOUTS["PP2"][1], SPREAD], ids=["tensor", "pipeline", "experts"]
)
def test_of_a_base_that_two_ranks_saved_every_expert_is_read(files, tmp_path, layout):
    forked.ranks(2, restored_and_saved, files["base"], tmp_path / "again.nemo", layout)
    seen = set()
    with open_base(files["base"]) as one, open_base(tmp_path / "again.nemo") as two:
        for number, name, layer in itertools.product(range(4), ("fc1", "fc2"), range(4)):
            where = f"mlp.experts.local_experts.{number}.linear_{name}", layer
            weight, again = one.weight(*where), two.weight(*where)
            assert torch.equal(again, weight.to(again.dtype)), where
            seen.add(float(weight.sum()))
    assert len(seen) == 4 * 2 * 4
