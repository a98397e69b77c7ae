"""Tied-LoRA: the papers' counts, the equation, its start values, and what stays frozen."""

import itertools

import pytest
import torch
from stack import Layers, follows
from torch import nn

from nemo_tiedlora import attach, variants
from nemo_tiedlora.errors import UsageError
from nemo_tiedlora.variants import PRESETS, Bank, FrozenWeight, Site, TiedConfig, build, count

LLAMA_7B = [Site("attention_qkv", layer, 4096, 12288) for layer in range(32)]
GPT_2B = [Site("attention_qkv", layer, 2048, 6144) for layer in range(24)]
#: Trainable parameters on Llama-2-7B at rank 8 (paper, table 1).
PUBLISHED = {
    "LoRA": 4_194_304,
    "TL1": 32_768,
    "TL2": 426_240,
    "TL3": 98_304,
    "TL4": 98_560,
    "TL5": 131_072,
    "TL6": 524_544,
    "VeRA": 393_472,
}
SUBSETS = [list(parts) for size in range(1, 5) for parts in itertools.combinations("ABuv", size)]
TIES = [[], ["A"], ["B"], ["A", "B"]]


def frozen(site, dtype=torch.float32):
    return FrozenWeight(torch.zeros(site.out_features, site.in_features, dtype=dtype))


def trainable(sites, **settings):
    return count(build(TiedConfig(**settings), 32), sites).trainable


@pytest.mark.parametrize("preset", PRESETS)
def test_llama_counts_are_the_published_ones(preset):
    assert trainable(LLAMA_7B, preset=preset, rank=8) == PUBLISHED[preset]


@pytest.mark.parametrize(
    ("preset", "rank", "percent"),
    [("TL6", 64, 5.3), ("TL6", 32, 6.5), ("TL6", 4, 22.9), ("TL1", 64, 1.0), ("VeRA", 64, 1.2)],
)
def test_gpt_2b_shares_are_the_published_ones(preset, rank, percent):
    share = 100 * trainable(GPT_2B, preset=preset, rank=rank) / trainable(GPT_2B, preset="LoRA", rank=rank)
    assert share == pytest.approx(percent, abs=0.06)  # the paper truncates some of its percentages


@pytest.mark.parametrize("rank", [2, 8, 128])
def test_tl5_has_the_same_share_at_every_rank(rank):
    share = trainable(GPT_2B, preset="TL5", rank=rank) / trainable(GPT_2B, preset="LoRA", rank=rank)
    assert round(100 * share, 1) == 4.2


@pytest.mark.parametrize("preset", PRESETS)
def test_parameters_on_the_meta_device_are_the_counted_ones(preset):
    model = Layers(32, 4096, 12288, torch.float32, "meta")
    attach(model, TiedConfig(preset=preset), ["qkv"])
    assert sum(p.numel() for p in model.parameters() if p.requires_grad) == PUBLISHED[preset]


def reference(model, named, x, settings, rank):
    """The paper's equation 1 on activations: z = W x + α/r Λv B Λu A x, with no code of ours."""
    width = x.shape[-1]
    for number, layer in enumerate(model.layers):
        linear = layer["qkv"]
        linear = getattr(linear, "base", linear)

        def part(name, number=number):
            tied = named.get(f"qkv.{name}")
            return tied if tied is not None else named.get(f"qkv.{number}.{name}")

        h = x @ part("A").T
        h = h if part("u") is None else h * part("u")
        h = h @ part("B").T
        h = h if part("v") is None else h * part("v")
        x = torch.tanh((x @ linear.weight.T + linear.bias + settings["alpha"] / rank * h)[..., :width])
    return x


@pytest.mark.parametrize("tie", TIES, ids=lambda tie: "tie" + "".join(tie))
@pytest.mark.parametrize("train", SUBSETS, ids="".join)
def test_forward_gradients_and_merge_follow_the_equation(train, tie):
    torch.manual_seed(0)
    settings = {"train": train, "tie": tie, "rank": 2, "alpha": 3.0}
    model = Layers()
    adapter = attach(model, TiedConfig(**settings), ["qkv"])
    named = adapter.named_tensors()
    with torch.no_grad():
        for tensor in named.values():
            tensor += torch.randn_like(tensor)
    trained = follows(adapter, lambda x: reference(model, named, x, settings, 2))
    assert {key.rpartition(".")[2] for key in trained} == set(train)


@pytest.mark.parametrize(("preset", "changes"), [(p, p in ("TL1", "TL3", "TL4")) for p in PRESETS])
def test_the_paper_start_changes_the_model_for_tl1_tl3_and_tl4_only(preset, changes):
    torch.manual_seed(0)
    model = Layers()
    x = torch.randn(4, 6, dtype=torch.float64)
    before = model(x)
    attach(model, TiedConfig(preset=preset, rank=2), ["qkv"])
    assert torch.equal(model(x), before) is not changes


@pytest.mark.parametrize("train", SUBSETS, ids="".join)
def test_the_zero_delta_start_never_changes_the_model_and_can_learn(train):
    torch.manual_seed(0)
    model = Layers()
    x = torch.randn(4, 6, dtype=torch.float64)
    before = model(x).detach()
    bank = attach(model, TiedConfig(train=train, rank=2, init_scheme="zero_delta"), ["qkv"]).bank
    assert torch.equal(model(x), before)
    model(x).square().sum().backward()
    assert any(t.grad is not None and t.grad.abs().max() > 0 for t in bank.named_tensors().values())


#: ‖ΔW x‖ / ‖W x‖ before the first step at width 512, W drawn with a standard deviation of 0.02.
PERTURBATION = {"paper": {2: 2.2, 8: 2.2, 32: 2.2, 128: 2.2}, "authors": {2: 74, 8: 139, 32: 273, 128: 566}}


@pytest.mark.parametrize("preset", ["TL1", "TL3"])
@pytest.mark.parametrize(("scheme", "rank"), [(scheme, rank) for scheme in PERTURBATION for rank in (2, 8, 32, 128)])
def test_the_authors_start_perturbs_more_the_larger_the_rank(scheme, rank, preset):
    torch.manual_seed(0)
    model = Layers(1, 512, 512, torch.float32)
    linear, x = model.layers[0]["qkv"], torch.randn(64, 512)
    torch.nn.init.normal_(linear.weight, std=0.02)
    torch.nn.init.zeros_(linear.bias)
    before = linear(x)
    attach(model, TiedConfig(preset=preset, rank=rank, init_scheme=scheme), ["qkv"])
    change = model.layers[0]["qkv"](x) - before
    assert (change.norm() / before.norm()).item() == pytest.approx(PERTURBATION[scheme][rank], rel=0.1)


@pytest.mark.parametrize("preset", ["TL6", "TL2", "VeRA", "LoRA", "TL5"])
def test_otherwise_the_authors_start_is_the_papers(preset):
    for site in (Site("qkv", 0, 6, 10), Site("qkv", 1, 6, 10)):
        specs = build(TiedConfig(preset=preset, rank=2, init_scheme="authors"), 2).tensors(site)
        paper = build(TiedConfig(preset=preset, rank=2, std_A=1.0, std_B=1.0), 2).tensors(site)
        assert specs == paper


def test_u_starts_where_it_is_told():
    model = Layers(dtype=torch.float32)
    named = attach(model, TiedConfig(preset="VeRA", rank=2, init_u=0.1), ["qkv"]).named_tensors()
    assert all((tensor == 0.1).all() for key, tensor in named.items() if key.endswith(".u"))


@pytest.mark.parametrize("preset", PRESETS)
def test_training_lowers_the_loss_and_leaves_frozen_tensors_bit_identical(preset):
    torch.manual_seed(0)
    model = Layers()
    bank = attach(model, TiedConfig(preset=preset, rank=4), ["qkv"]).bank
    adapters = {t.data_ptr() for t in bank.named_tensors().values() if t.requires_grad}
    everything = [*model.parameters(), *model.buffers()]
    before = {t: t.detach().clone() for t in everything}
    x, target = torch.randn(16, 6, dtype=torch.float64), torch.rand(16, 6, dtype=torch.float64)
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], 1e-2, weight_decay=0.01)
    losses = []
    for _ in range(60):
        loss = (model(x) - target).square().mean()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert losses[-1] < 0.9 * losses[0]
    for tensor, start in before.items():
        assert torch.equal(tensor, start) is (tensor.data_ptr() not in adapters)


def test_a_frozen_factor_is_drawn_again_whatever_the_order_and_dtype():
    site = Site("attention_qkv", 3, 6, 10)
    banks = []
    for sites in ([Site("mlp_fc1", 0, 6, 4), site], [site]):
        bank = Bank(build(TiedConfig(preset="VeRA", rank=2), 32))
        for each in sites:
            bank.adopt(nn.Module(), each, frozen(each, torch.float64))
        banks.append(bank)
    first, second = (bank.tensors(site) for bank in banks)
    assert torch.equal(first["A"], second["A"]) and torch.equal(first["B"], second["B"])
    assert banks[1].checksums["attention_qkv.A"] == banks[0].checksums["attention_qkv.A"]


def test_a_frozen_factor_that_is_not_the_trained_one_is_refused():
    bank = Bank(build(TiedConfig(preset="VeRA", rank=2), 32), checksums={"q.A": "0" * 64})
    with pytest.raises(UsageError, match="not the one this adapter was trained against"):
        bank.adopt(nn.Module(), Site("q", 0, 6, 10), frozen(Site("q", 0, 6, 10)))


def test_frozen_factors_are_no_parameters_and_are_not_saved():
    model = Layers()
    attach(model, TiedConfig(preset="TL1", rank=2), ["qkv"])
    added = [key for key in model.state_dict() if ".adapter." in key]
    assert added == ["layers.0.qkv.adapter.A"]


@pytest.mark.parametrize("matrix", ["A", "B"])
@pytest.mark.parametrize("kind", ["normal", "kaiming_uniform", "kaiming_normal", "xavier"])
def test_initialisers_have_their_standard_deviation(kind, matrix):
    fan_in = {"A": 400, "B": 50}[matrix]
    shape = {"A": (50, 400), "B": (600, 50)}[matrix]
    expected = {
        "normal": fan_in**-0.5,
        "kaiming_uniform": nn.init.kaiming_uniform_(torch.empty(shape), a=5**0.5).std().item(),
        "kaiming_normal": (2 / fan_in) ** 0.5,
        "xavier": (2 / sum(shape)) ** 0.5,
    }[kind]
    config = TiedConfig(preset="VeRA", rank=50, **{f"init_{matrix}": kind})
    bank = Bank(build(config, 32))
    site = Site("t", 0, 400, 600)
    bank.adopt(nn.Module(), site, frozen(site))
    assert bank.tensors(site)[matrix].std().item() == pytest.approx(expected, rel=0.05)


def test_an_explicit_standard_deviation_wins():
    bank = Bank(build(TiedConfig(preset="VeRA", rank=8, std_A=0.5), 32))
    site = Site("t", 0, 4000, 16)
    bank.adopt(nn.Module(), site, frozen(site))
    assert bank.tensors(site)["A"].std().item() == pytest.approx(0.5, rel=0.03)


def test_dropout_acts_in_training_only():
    torch.manual_seed(0)
    model = Layers()
    bank = attach(model, TiedConfig(preset="LoRA", rank=2, dropout=0.5), ["qkv"]).bank
    with torch.no_grad():
        for tensor in bank.named_tensors().values():
            tensor.normal_()
    x = torch.randn(4, 6, dtype=torch.float64)
    assert not torch.equal(model(x), model(x))
    model.eval()
    assert torch.equal(model(x), model(x))


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"preset": "tl6"}, "preset='tl6': did you mean 'TL6'?"),
        ({"train": ["A", "w"]}, "train='w'"),
        ({"train": []}, "nothing would be trained"),
        ({"tie": ["u"]}, "tie='u'"),
        ({"rank": 0}, "rank=0: must be a whole number > 0"),
        ({"rank": 2.5}, "rank=2.5"),
        ({"alpha": -1}, "alpha=-1"),
        ({"dropout": 1.0}, "dropout=1.0"),
        ({"init_scheme": "papers"}, "did you mean 'paper'?"),
        ({"init_A": "orthogonal"}, "init_A='orthogonal'"),
        ({"std_A": 0.0}, "std_A=0.0"),
        ({"ranc": 8}, "ranc=8: unknown setting; did you mean 'rank'?"),
        ({"init_u": 0}, "init_u=0: must be a finite number other than 0"),
        ({"init_u": float("nan")}, "init_u=nan"),
        ({"init_u": 0.1, "preset": "TL5"}, "init_u=0.1: u is not trained, but A, B"),
        ({"init_u": 0.1, "train": ["u"], "init_scheme": "zero_delta"}, "zero_delta starts u at 0 here"),
    ],
)
def test_bad_settings_are_named(settings, message):
    with pytest.raises(UsageError) as error:
        variants.config_for("tied_lora", settings)
    assert message in str(error.value) and "\n" not in str(error.value)


def test_a_rank_larger_than_the_layer_is_refused():
    with pytest.raises(UsageError, match="rank=7: larger than the layer"):
        attach(Layers(), TiedConfig(rank=7), ["qkv"])


def test_an_unknown_target_is_refused():
    with pytest.raises(UsageError, match="did you mean 'qkv'"):
        attach(Layers(), TiedConfig(), ["qkw"])
