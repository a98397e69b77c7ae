"""LoRA-XS: the published counts, the equation against numpy's decomposition, and what an adapter must bring along."""

import numpy
import pytest
import torch
from stack import Layers, follows

from nemo_tiedlora import attach
from nemo_tiedlora.errors import UsageError
from nemo_tiedlora.variants import Site, build, config_for, count


@pytest.mark.parametrize(("rank", "published"), [(4, 1.5), (8, 6.1), (12, 13.8), (16, 24.6), (20, 38.4), (25, 60)])
def test_roberta_large_has_the_published_counts(rank, published):
    kinds = ("attention_q", "attention_v", "attention_dense", "mlp_fc2")
    sites = [Site(kind, layer, 1024, 1024) for kind in kinds for layer in range(24)]
    trainable = count(build(config_for("lora_xs", {"rank": rank}), 24), sites).trainable
    assert round(trainable / 1000, 1) == published


def attached(**settings):
    torch.manual_seed(0)
    model = Layers()
    config = config_for("lora_xs", {"rank": 2, "alpha": 3.0, "std_R": 0.5, **settings})
    return attach(model, config, ["qkv"])


def test_forward_gradients_and_merge_follow_the_equation():
    adapter = attached()
    model, named = adapter.model, adapter.named_tensors()
    deltas = []
    for number, layer in enumerate(model.layers):
        U, S, Vh = numpy.linalg.svd(layer["qkv"].weight.detach().numpy())
        for k in range(2):
            if Vh[k][numpy.abs(Vh[k]).argmax()] < 0:
                U[:, k], Vh[k] = -U[:, k], -Vh[k]
        R = named[f"qkv.{number}.R"]
        deltas.append((torch.tensor(U[:, :2] * S[:2]), R, torch.tensor(Vh[:2])))

    def reference(x):
        for layer, (left, R, right) in zip(model.layers, deltas, strict=True):
            linear = getattr(layer["qkv"], "base", layer["qkv"])
            W = linear.weight.detach() + 1.5 * left @ R @ right
            x = torch.tanh((x @ W.T + linear.bias)[..., :6])
        return x

    # The decomposition is in float32, as those of large weights should be; the rest is compared in float64.
    for number, (left, _, right) in enumerate(deltas):
        for name, expected in (("B", left), ("A", right)):
            stored = named[f"qkv.{number}.{name}"]
            torch.testing.assert_close(stored, expected, rtol=1e-5, atol=1e-5)
            expected.copy_(stored)
    assert follows(adapter, reference) == {f"qkv.{number}.R" for number in range(3)}


def test_it_starts_near_the_base_and_learns():
    from stack import train

    model = Layers(dtype=torch.float32)
    x = torch.randn(4, 6)
    before = model(x)
    attach(model, config_for("lora_xs", {"rank": 4}), ["qkv"])
    torch.testing.assert_close(model(x), before, rtol=1e-3, atol=1e-3)
    losses = train(model, steps=120, lr=3e-2)
    assert losses[-1] < 0.95 * losses[0]


def test_the_frozen_factors_are_counted_as_stored():
    sites = [Site("qkv", layer, 6, 10) for layer in range(3)]
    counted = count(build(config_for("lora_xs", {"rank": 2}), 3), sites)
    assert counted == (3 * 4, 0, 3 * 2 * 16)


def test_bad_settings_are_refused():
    with pytest.raises(UsageError, match="std_R=0"):
        config_for("lora_xs", {"std_R": 0})
    with pytest.raises(UsageError, match="lr_ratio=4.0: nothing to tell apart: only A is trained"):
        attached(lr_ratio=4.0)
