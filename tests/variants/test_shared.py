"""ShareLoRA: the published counts, the equation, and what is shared."""

import pytest
import torch
from stack import Layers, follows, train

from nemo_tiedlora import attach, variants
from nemo_tiedlora.errors import UsageError
from nemo_tiedlora.variants import SharedConfig, Site, TiedConfig, build, count

PUBLISHED_GROUPS = [[16, 17], [18, 19], [20, 21, 22], [23, 24, 25, 26, 27], [28, 29, 30]]
SHAPES = {
    "attention_q": (4096, 4096),
    "attention_k": (4096, 4096),
    "attention_v": (4096, 4096),
    "mlp_up": (4096, 11008),
    "mlp_down": (11008, 4096),
}
LLAMA_7B = [Site(target, layer, *shape) for target, shape in SHAPES.items() for layer in range(32)]


def test_the_published_groups_have_the_published_counts():
    lora = build(TiedConfig(preset="LoRA", rank=8), 32)
    shared = build(SharedConfig(groups=PUBLISHED_GROUPS, rank=8, rank_expansion=9), 32)
    assert count(lora, LLAMA_7B).trainable == 14_024_704
    assert count(shared, LLAMA_7B).trainable == 10_847_232


@pytest.mark.parametrize("groups", [PUBLISHED_GROUPS, [[0, 31]], [list(range(32))]])
@pytest.mark.parametrize("rank", [1, 8, 64])
def test_the_budget_never_exceeds_unshared_lora_and_leaves_no_rank_unused(groups, rank):
    unshared = count(build(TiedConfig(preset="LoRA", rank=rank), 32), LLAMA_7B).trainable
    spent = build(SharedConfig(groups=groups, rank=rank, rank_expansion="budget"), 32)
    more = build(SharedConfig(groups=groups, rank=rank, rank_expansion=spent.rank + 1), 32)
    assert count(spent, LLAMA_7B).trainable <= unshared < count(more, LLAMA_7B).trainable


@pytest.mark.parametrize("selection", [[1, 2], [1, 3, 5], [2, 17, 18, 19]])
def test_the_budget_counts_adapted_layers_only(selection):
    sites = [site for site in LLAMA_7B if site.layer + 1 in selection]
    settings = {"groups": PUBLISHED_GROUPS, "rank": 8, "layer_selection": selection}
    unshared = count(build(TiedConfig(preset="LoRA", rank=8), 32), sites).trainable
    spent = build(SharedConfig(rank_expansion="budget", **settings), 32)
    assert count(spent, sites).trainable <= unshared


def reference(model, named, x, groups, scale, with_scales):
    """x W_lᵀ + s (x A_g(l)ᵀ) B_g(l)ᵀ with the group looked up in a plain list."""
    for number, layer in enumerate(model.layers):
        leader = next((group[0] for group in groups if number in group), number)
        h = x @ named[f"qkv.{leader}.A"].T
        h = (h * named[f"qkv.{number}.u"] if with_scales else h) @ named[f"qkv.{leader}.B"].T
        h = h * named[f"qkv.{number}.v"] if with_scales else h
        base = layer["qkv"]
        x = torch.tanh((x @ base.weight.T + base.bias + scale * h)[..., :6])
    return x


@pytest.mark.parametrize("with_scales", [False, True])
@pytest.mark.parametrize("groups", [[[0, 1]], [[0, 3], [1, 2]], []])
def test_forward_gradients_and_merge_follow_the_equation(groups, with_scales):
    torch.manual_seed(0)
    model = Layers(4)
    parts = ["A", "B", "u", "v"] if with_scales else ["A", "B"]
    adapter = attach(model, SharedConfig(groups=groups, rank=2, alpha=3.0, train=parts), ["qkv"])
    named = adapter.named_tensors()
    with torch.no_grad():
        for tensor in named.values():
            tensor += torch.randn_like(tensor)
    follows(adapter, lambda x: reference(model, named, x, groups, 1.5, with_scales))


@pytest.mark.parametrize("parts", [["A", "B"], ["A", "B", "u", "v"]])
def test_it_starts_from_the_base_and_learns(parts):
    model = Layers(4)
    x = torch.randn(4, 6, dtype=torch.float64)
    before = model(x)
    attach(model, SharedConfig(rank=2, train=parts), ["qkv"])
    assert torch.equal(model(x), before)
    losses = train(model)
    assert losses[-1] < 0.9 * losses[0]


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"groups": "odd_evn"}, "groups='odd_evn': no such file"),
        ({"groups": None}, "groups=None"),
        ({"groups": [[0, True]]}, "the model has layers"),
        ({"shared_layers": "x"}, "shared_layers='x'"),
        ({"groups": [[0, 40]]}, "the model has layers 0 to 7"),
        ({"groups": "random_adjacent", "shared_layers": 8}, "shared_layers=8: must be 1 to 7"),
        ({"rank_expansion": "bugdet"}, "rank_expansion='bugdet'"),
        ({"rank_expansion": 0}, "rank_expansion=0"),
        ({"rank_expansion": "budget", "train": ["A", "B", "u"]}, "counts A and B only"),
        ({"train": ["A"]}, "ShareLoRA trains A and B"),
    ],
)
def test_bad_settings_are_named(settings, message):
    with pytest.raises(UsageError) as error:
        build(variants.config_for("share_lora", settings), 8)
    assert message in str(error.value)
