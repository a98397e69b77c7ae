"""Every method on bases of other forms: biases, norms of heads, learned positions, no gate, experts."""

import bases
import pytest
import torch
import toy
from omegaconf import OmegaConf
from test_adapter import logits
from test_saved import CASES

from nemo_tiedlora.checkpoint import read
from nemo_tiedlora.checkpoint.base import open_base
from nemo_tiedlora.checkpoint.merge import merge, unmerge
from nemo_tiedlora.errors import UsageError
from nemo_tiedlora.model.targets import where

ATTENTION = [["attention"], ["attention_q", "attention_k", "attention_v", "attention_dense"]]
#: By base: target modules, as fused and as single matrices.
FUSED_AND_SINGLE = {
    "gpt2": [["all"], [*ATTENTION[1], "mlp_fc1", "mlp_fc2"]],
    "heads": [["all"], [*ATTENTION[1], "mlp_gate", "mlp_up", "mlp_fc2"]],
    "experts": [["all"], ["attention_dense", "mlp_gate", "mlp_up", "mlp_fc2"]],
    "shared expert": [["mlp"], ["mlp_gate", "mlp_fc2"]],
}


@pytest.fixture(scope="module", autouse=True)
def other_bases(files):
    """The bases, among the files that ``finetuning`` chooses from."""
    folder = files["llama"].parent
    for name in bases.BASES:
        files[name] = bases.save(name, folder / "tokenizer.model", folder)


#: Experts see tokens and not samples, of which DynaLoRA's other importance is a sum.
BACKWARD = {"importance": "backward"}
#: Of all pairs, those that `make test` runs: methods that read W, that gather it, and that watch outputs or gradients.
QUICK = {("gpt2", "cond"), ("heads", "dyna"), ("experts", "dyna-cond-dora"), ("shared expert", "uni")}


def pairs():
    """Every method on every base, on fused or on single matrices, as test parameters."""
    for number, case in enumerate(CASES):
        for place, base in enumerate(bases.BASES):
            marks = [] if (base, case) in QUICK else [pytest.mark.thorough]
            yield pytest.param(base, case, (number + place) % 2, id=f"{base}-{case}", marks=marks)


@pytest.mark.parametrize(("base", "case", "kind"), pairs())
def test_trained_saved_loaded_and_merged_give_the_same_logits(finetuning, files, tmp_path, base, case, kind):
    scheme, settings = CASES[case]
    settings = {"rank": 4, "target_modules": FUSED_AND_SINGLE[base][kind]} | settings
    settings |= BACKWARD if scheme == "dyna_lora" and "expert" in base else {}
    torch.manual_seed(0)
    model, trainer = finetuning(base, peft_scheme=scheme, trainer={"max_steps": 3}, **{f"{scheme}_tuning": settings})
    before = logits(model)
    trainer.fit(model)
    with torch.no_grad():
        for _, parameter in model.adaptations[scheme].bank.trained().values():  # three steps do not take them far
            parameter.add_(0.1 * torch.randn_like(parameter))
    expected = logits(model)
    assert not torch.allclose(expected, before, rtol=0.01, atol=0.01)
    model.save_to(str(tmp_path / "adapter.nemo"))
    adapter = read(tmp_path / "adapter.nemo")

    fresh, _ = finetuning(base, peft_scheme="none")
    fresh.load_adapters(str(tmp_path / "adapter.nemo"))
    assert torch.equal(logits(fresh), expected)

    facts = merge(files[base], tmp_path / "adapter.nemo", tmp_path / "merged.nemo")
    assert facts["base_checksum"] == "matches"
    files["merged"] = tmp_path / "merged.nemo"
    whole, _ = finetuning("merged", peft_scheme="none")
    torch.testing.assert_close(logits(whole), expected, rtol=1e-4, atol=1e-4)

    if not adapter.variant.final_at_merge():
        unmerge(tmp_path / "merged.nemo", tmp_path / "adapter.nemo", tmp_path / "back.nemo")
        with open_base(tmp_path / "back.nemo") as after, open_base(files[base]) as first:
            assert after.config == first.config
            for path in adapter.paths:
                for layer in range(4):
                    torch.testing.assert_close(after.weight(path, layer), first.weight(path, layer), rtol=0, atol=1e-6)


def weights_by_the_equation(tensors, target, layer, W):
    """W with the adapter in it, in float64: W + s diag(v) B diag(u) A, each row then of length m; s is 1."""
    named = {key: tensor.double() for key, tensor in tensors.items()}
    A, B = (named[f"{target}.{part}"] for part in "AB")
    u, v = (named[f"{target}.{layer}.{part}"] for part in "uv")
    changed = W.double() + (v[:, None] * B) @ (u[:, None] * A)
    return named[f"{target}.{layer}.m"][:, None] * changed / changed.norm(dim=1, keepdim=True)


@pytest.mark.parametrize("base", bases.BASES)
def test_the_adapted_model_is_the_plain_one_with_other_weights(finetuning, tmp_path, base):
    """The equation, put into a stock model; where DoRA gives a row of W another length, biases stay as they are."""
    torch.manual_seed(0)
    settings = {"rank": 4, "dora": True, "target_modules": FUSED_AND_SINGLE[base][0]}
    model, _ = finetuning(base, peft_scheme="tied_lora", tied_lora_tuning=settings)
    with torch.no_grad():
        for _, tensor in model.adaptations["tied_lora"].bank.trained().values():
            tensor.add_(0.2 * torch.rand_like(tensor))
    model.setup_complete = True
    model.save_to(str(tmp_path / "adapter.nemo"))
    tensors = read(tmp_path / "adapter.nemo").tensors
    plain, _ = finetuning(base, peft_scheme="none")
    before = logits(plain)
    targets = {key.split(".")[0] for key in tensors}
    assert len(targets) == {"experts": 2 + 2 * 4, "shared expert": 2 * 4}.get(base, 4)
    for number, layer in enumerate(plain.model.decoder.layers):
        for target in targets:
            weight = layer.get_submodule(where(target).path).weight
            weight.data = weights_by_the_equation(tensors, target, number, weight.data).float()
    assert not torch.allclose(logits(plain), before, rtol=0.01, atol=0.01)
    torch.testing.assert_close(logits(model), logits(plain), rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("optimizer", ["adamw", pytest.param("mcore_distributed_optim", marks=pytest.mark.thorough)])
def test_an_expert_that_no_token_reaches_learns_nothing(finetuning, files, tmp_path, optimizer):
    """Of two pairs of opposite rows the router gives every token one each, and never the fifth, which is 0."""
    files["five"] = bases.save("experts", files["llama"].parent / "tokenizer.model", tmp_path, num_moe_experts=5)
    optim = toy.OPTIM | {"name": optimizer, "weight_decay": 0.0}
    optim |= {"average_in_collective": False} if "distributed" in optimizer else {}  # gloo sums only
    settings = {"rank": 4, "target_modules": ["mlp"], "preset": "LoRA"}
    model, trainer = finetuning(
        "five", peft_scheme="tied_lora", tied_lora_tuning=settings, model={"optim": optim}, trainer={"max_steps": 2}
    )
    for layer in model._unwrap_layers_model_list():
        rows = layer.mlp.router.weight.data
        rows[1], rows[3], rows[4] = -rows[0], -rows[2], 0
    bank = model.adaptations["tied_lora"].bank
    before = {key: tensor.detach().clone() for key, tensor in bank.named_tensors().items()}
    trainer.fit(model)
    learned = {key for key, tensor in bank.named_tensors().items() if not torch.equal(tensor, before[key])}
    reached = {key for key in before if "_expert_4." not in key}
    assert learned == reached and len(before) - len(reached) == 2 * 4 * 2  # layers of an expert, of the model, factors


def test_experts_that_have_no_layers_here_get_no_adapter(files):
    """NeMo's own scripts come here without this package's checks of a job."""
    from nemo_tiedlora.nemo.peft_config import FactorPEFTConfig

    with open_base(files["experts"]) as base:
        config = base.config | {"peft": {"tied_lora_tuning": {"target_modules": ["mlp_down"]}}}
    for field, value, said in (
        ("moe_grouped_gemm", True, "target_modules='mlp_down': the base's experts have no linear layers of their own"),
        ("expert_model_parallel_size", 2, "model.expert_model_parallel_size=2: adapters go into experts that every"),
    ):
        with pytest.raises(UsageError, match=f"^{said}"):
            FactorPEFTConfig("tied_lora", OmegaConf.create(config | {field: value}))
