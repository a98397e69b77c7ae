"""A base of experts: what cannot be done with it is said before it is loaded, by every command."""

import pytest
from checkpoint.conftest import _make
from omegaconf import OmegaConf
from test_inputs import BASE, job, nemo_file, refusal
from typer.testing import CliRunner

from benchmark_suite.runner import sweep
from nemo_tiedlora import cli
from nemo_tiedlora.checkpoint import read, write
from nemo_tiedlora.checkpoint.saved import check_adapter
from nemo_tiedlora.errors import UsageError
from nemo_tiedlora.job.finetune import checked
from nemo_tiedlora.model.sizes import sizes
from nemo_tiedlora.variants import METHODS, config_for

EXPERTS = BASE | {"num_moe_experts": 4}
INSTEAD = "the base has 4 experts (num_moe_experts) instead of an MLP, and adapters go on its attention only"
PARALLEL = ("model.tensor_model_parallel_size=2", "trainer.devices=2")


@pytest.mark.parametrize("scheme", METHODS)
@pytest.mark.parametrize("targets", [["attention"], ["attention_q", "attention_v", "attention_dense"]])
def test_targets_in_the_attention_pass_and_count_as_on_any_other_base(tmp_path, scheme, targets):
    named = f"model.peft.{scheme}_tuning.target_modules=[{','.join(targets)}]"
    checked(job(tmp_path, f"model.peft.peft_scheme={scheme}", named), OmegaConf.create(EXPERTS))
    config = config_for(scheme, {"target_modules": targets})
    assert sizes(config, OmegaConf.create(EXPERTS)) == sizes(config, OmegaConf.create(BASE))


@pytest.mark.parametrize("target", ["all", "mlp", "mlp_fc1", "mlp_fc2", "mlp_gate", "mlp_up", "mlp_down"])
def test_targets_in_the_mlp_are_refused_under_the_name_given(tmp_path, target):
    named = f"model.peft.vera_tuning.target_modules=[{target}]"
    said = refusal(job(tmp_path, "model.peft.peft_scheme=vera", named), EXPERTS)
    assert said.startswith(f"model.peft.vera_tuning.target_modules={target!r}: {INSTEAD}: attention, attention_qkv")


@pytest.mark.parametrize(
    ("overrides", "said"),
    [
        (["model.peft.peft_scheme=ia3"], "model.peft.peft_scheme='ia3': the base has 4 experts"),
        (["model.peft.peft_scheme=parallel_adapter"], "model.peft.peft_scheme='parallel_adapter': the base has 4"),
        (
            ["model.peft.peft_scheme=lora", "model.peft.lora_tuning.target_modules=[all]"],
            f"model.peft.lora_tuning.target_modules='all': {INSTEAD}",
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


def test_commands_and_the_suite_do_not_count_an_mlp_that_is_not_there(tmp_path):
    base = nemo_file(tmp_path / "experts.nemo", EXPERTS)
    for targets in ("all", "mlp_fc1"):
        with pytest.raises(UsageError, match=f"^target_modules='{targets}': the base has 4 experts"):
            CliRunner().invoke(cli.app, ["params", "--base", str(base), "--targets", targets], catch_exceptions=False)
    with pytest.raises(UsageError, match=r"^ShareLoRA\.target_modules='mlp_up': the base has 4 experts"):
        sweep.matrix({}, sweep.variants_named(["ShareLoRA"]), base, None, [0], None, None)


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
    with pytest.raises(UsageError, match="target_modules='all': the base has 4 experts"):
        _make(shape=shape | {"num_moe_experts": 4}, target_modules=["all"])
