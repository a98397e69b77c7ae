"""A base of experts: what is adapted and counted, and what cannot be done is said before it is loaded."""

import json
import re

import pytest
from checkpoint.conftest import _make
from omegaconf import OmegaConf
from test_inputs import BASE, job, nemo_file, refusal
from typer.testing import CliRunner

from benchmark_suite import registry
from benchmark_suite.backends import backend
from nemo_tiedlora import cli
from nemo_tiedlora.checkpoint import read, write
from nemo_tiedlora.checkpoint.saved import check_adapter
from nemo_tiedlora.errors import UsageError
from nemo_tiedlora.job.finetune import checked
from nemo_tiedlora.model.config import nemo_config
from nemo_tiedlora.model.sizes import sizes
from nemo_tiedlora.variants import METHODS, config_for

EXPERTS = BASE | {"num_moe_experts": 4}
GROUPED = EXPERTS | {"moe_grouped_gemm": True}
NO_LAYERS = "the base's experts have no linear layers of their own (moe_grouped_gemm); use attention, attention_qkv, "
PARALLEL = ("model.tensor_model_parallel_size=2", "trainer.devices=2")


@pytest.mark.parametrize("scheme", METHODS)
@pytest.mark.parametrize("targets", [["attention"], ["attention_q", "attention_v", "attention_dense"]])
def test_targets_in_the_attention_pass_and_count_as_on_any_other_base(tmp_path, scheme, targets):
    named = f"model.peft.{scheme}_tuning.target_modules=[{','.join(targets)}]"
    checked(job(tmp_path, f"model.peft.peft_scheme={scheme}", named), OmegaConf.create(EXPERTS))
    config = config_for(scheme, {"target_modules": targets})
    assert sizes(config, OmegaConf.create(EXPERTS)) == sizes(config, OmegaConf.create(BASE))


@pytest.mark.parametrize("scheme", METHODS)
def test_every_expert_counts_as_an_mlp_of_its_own(tmp_path, scheme):
    """But for Uni-LoRA's one vector. TL6 has a pair per expert, and vectors per expert and layer."""
    backward = {"importance": "backward"} if scheme == "dyna_lora" else {}
    settings = [f"model.peft.{scheme}_tuning.{name}={value}" for name, value in backward.items()]
    named = f"model.peft.{scheme}_tuning.target_modules=[mlp]"
    checked(job(tmp_path, f"model.peft.peft_scheme={scheme}", named, *settings), OmegaConf.create(EXPERTS))
    config = config_for(scheme, {"target_modules": ["mlp"]} | backward)
    dense, experts = (sizes(config, OmegaConf.create(base)) for base in (BASE, EXPERTS))
    times = 1 if scheme == "uni_lora" else 4
    assert experts.trainable == times * dense.trainable
    if scheme == "tied_lora":
        r, layers, hidden, ffn = 8, 4, 32, 64
        assert experts.trainable == 4 * sum(r * (32 + 64) + layers * (r + out) for out in (ffn, hidden))


def test_experts_of_another_width(tmp_path):
    model = OmegaConf.create(EXPERTS | {"moe_ffn_hidden_size": 24})
    config = config_for("tied_lora", {"target_modules": ["all"], "preset": "LoRA", "rank": 2})
    attention = 2 * ((32 + 64) + (32 + 32))
    assert sizes(config, model).trainable == 4 * (attention + 4 * 2 * 2 * (32 + 24))


@pytest.mark.parametrize("target", ["all", "mlp", "mlp_fc1", "mlp_fc2", "mlp_gate", "mlp_up", "mlp_down"])
def test_grouped_experts_are_refused_under_the_name_given(tmp_path, target):
    named = f"model.peft.vera_tuning.target_modules=[{target}]"
    said = refusal(job(tmp_path, "model.peft.peft_scheme=vera", named), GROUPED)
    assert said.startswith(f"model.peft.vera_tuning.target_modules={target!r}: {NO_LAYERS}")


@pytest.mark.parametrize(
    ("overrides", "said"),
    [
        (["model.peft.peft_scheme=ia3"], "model.peft.peft_scheme='ia3': the base has 4 experts"),
        (["model.peft.peft_scheme=parallel_adapter"], "model.peft.peft_scheme='parallel_adapter': the base has 4"),
        (
            ["model.peft.peft_scheme=lora", "model.peft.lora_tuning.target_modules=[all]"],
            "model.peft.lora_tuning.target_modules='all': NeMo's lora does not go into the base's 4 experts; use atten",
        ),
        (
            ["model.peft.peft_scheme=dyna_lora", "model.peft.dyna_lora_tuning.target_modules=[all]"],
            "model.peft.dyna_lora_tuning.importance='forward': mlp_fc1_expert_0 sees tokens that a router sends it",
        ),
        (
            ["model.peft.peft_scheme=vera", "model.peft.vera_tuning.target_modules=[mlp_fc1_expert_0]"],
            "model.peft.vera_tuning.target_modules='mlp_fc1_expert_0': did you mean 'mlp_fc1'",
        ),
        (PARALLEL, "model.sequence_parallel=False: Megatron trains a base of experts on 2 tensor-parallel ranks only"),
        (["+model.expert_model_parallel_size=2"], "model.expert_model_parallel_size=2: experts stay on one rank"),
    ],
)
def test_what_else_does_not_work_is_refused(tmp_path, overrides, said):
    assert refusal(job(tmp_path, *overrides), EXPERTS).startswith(said)


def test_the_layouts_and_schemes_that_work_pass(tmp_path):
    settings = ("model.sequence_parallel=true", "+model.expert_model_parallel_size=1")
    for scheme in ("lora", "adapter", "ptuning", "none"):
        checked(job(tmp_path, *PARALLEL, *settings, f"model.peft.peft_scheme={scheme}"), OmegaConf.create(EXPERTS))


def test_commands_and_the_suite_count_experts_and_refuse_grouped_ones(tmp_path):
    base, grouped = (
        nemo_file(tmp_path / f"{number}.nemo", shape | {"activation": "fast-swiglu"})
        for number, shape in enumerate((EXPERTS, GROUPED))
    )
    params = ["params", "--targets", "all", "--json", "--base"]
    counted = json.loads(CliRunner().invoke(cli.app, [*params, str(base)], catch_exceptions=False).stdout)
    config = config_for("tied_lora", {"target_modules": ["all"]})
    assert counted["trainable"] == sizes(config, nemo_config(base, "base")).trainable
    variant = registry.variant("ShareLoRA")
    backend("nemo", base).check(variant, 8, head=False)
    with pytest.raises(UsageError, match=f"^target_modules='all': {re.escape(NO_LAYERS)}"):
        CliRunner().invoke(cli.app, [*params, str(grouped)], catch_exceptions=False)
    with pytest.raises(UsageError, match=r"^ShareLoRA\.target_modules='mlp_up': the base's experts have no"):
        backend("nemo", grouped).check(variant, 8, head=False)


def test_an_adapter_of_a_dense_base_is_not_put_on_experts_nor_the_other_way_round(tmp_path):
    """Merging and loading begin with this check."""
    shape = {"activation": "gelu"}
    for name, own, other in (("dense", BASE, EXPERTS), ("experts", EXPERTS, BASE)):
        write(_make(shape=shape | {"num_moe_experts": own.get("num_moe_experts")}), tmp_path / name)
        check_adapter(tmp_path / name, OmegaConf.create(own), "adapter")
        was, here = own.get("num_moe_experts"), other.get("num_moe_experts")
        with pytest.raises(UsageError, match=f"made for another base: num_moe_experts was {was}, here it is {here}"):
            check_adapter(tmp_path / name, OmegaConf.create(other), "adapter")
    assert read(tmp_path / "experts").base.shape["num_moe_experts"] == 4
    with pytest.raises(UsageError, match="num_moe_experts=65536: in 4 layers, more than any model has"):
        _make(shape=shape | {"num_moe_experts": 2**16}, target_modules=["all"])
