"""Uni-LoRA: the projection written out as a matrix, Hugging Face's implementation, and what makes no sense with it."""

import peft
import pytest
import torch
from stack import Layers, follows, train

from nemo_tiedlora import attach
from nemo_tiedlora.errors import UsageError
from nemo_tiedlora.variants import Site, build, config_for, count

D = 3 * 2 * (6 + 10)


def attached(dtype=torch.float64, **settings):
    torch.manual_seed(0)
    model = Layers(dtype=dtype)
    config = config_for("uni_lora", {"rank": 2, "dimension": 20, "bound": 0.5, **settings})
    return attach(model, config, ["qkv"])


def projection(named):
    """P (D, d), from the columns alone."""
    columns = [named[f"qkv.{layer}.columns_{factor}"].flatten() for layer in range(3) for factor in "AB"]
    columns = torch.cat(columns).long()
    P = torch.zeros(len(columns), 20, dtype=torch.float64)
    P[torch.arange(len(columns)), columns] = 1
    return P / P.sum(0).sqrt()


def test_the_projection_is_isometric():
    named = attached().named_tensors()
    P = projection(named)
    assert P.shape == (D, 20)
    torch.testing.assert_close(P.T @ P, torch.eye(20, dtype=torch.float64))


def test_forward_gradients_and_merge_follow_the_equation():
    adapter = attached(alpha=3.0)
    model, named = adapter.model, adapter.named_tensors()
    P = projection(named)

    def reference(x):
        flat = (P @ named["theta"]).split([12, 20] * 3)
        for number, layer in enumerate(model.layers):
            W, bias = layer["qkv"].weight, layer["qkv"].bias
            A, B = flat[2 * number].view(2, 6), flat[2 * number + 1].view(10, 2)
            x = torch.tanh((x @ W.T + bias + 1.5 * (x @ A.T) @ B.T)[..., :6])
        return x

    assert follows(adapter, reference) == {"theta"}


def test_hugging_faces_gives_the_same():
    adapter = attached(torch.float32)
    model, named = adapter.model, adapter.named_tensors()
    torch.manual_seed(0)
    theirs = peft.get_peft_model(
        Layers(dtype=torch.float32), peft.UniLoraConfig(r=2, theta_d_length=20, target_modules=["qkv"])
    )
    counts = projection(named).ne(0).sum(0)
    for number, layer in enumerate(theirs.base_model.model.layers):
        for factor in "AB":
            columns = named[f"qkv.{number}.columns_{factor}"].long()
            getattr(layer["qkv"], f"unilora_indices_{factor}")["default"] = columns
            getattr(layer["qkv"], f"unilora_scales_{factor}")["default"] = counts.float().rsqrt()[columns]
    vector = theirs.base_model.unilora_theta_d["default"]
    with torch.no_grad():
        vector.copy_(named["theta"])
    x = torch.randn(4, 6)
    torch.testing.assert_close(model(x), theirs(x))
    for one in (model, theirs):
        one(x).square().sum().backward()
    torch.testing.assert_close(named["theta"].grad, vector.grad)


def test_it_has_as_many_parameters_as_it_is_told_and_learns_with_them():
    sites = [Site("qkv", layer, 4096, 12288) for layer in range(32)]
    variant = build(config_for("uni_lora", {"rank": 8, "dimension": 1000}), 32)
    assert count(variant, sites).trainable == 1000
    model = attached(torch.float32).model
    losses = train(model, steps=120, lr=3e-2)
    assert losses[-1] < 0.97 * losses[0]


@pytest.mark.parametrize(
    ("scheme", "settings", "message"),
    [
        ("uni_lora", {"dimension": 0}, "dimension=0"),
        ("uni_lora", {"bound": 0.0}, "bound=0.0: must be > 0"),
        ("dyna_lora", {"inner": "uni_lora"}, "inner='uni_lora': all its modules are one tensor"),
    ],
)
def test_bad_settings_are_refused(scheme, settings, message):
    with pytest.raises(UsageError, match=message):
        config_for(scheme, settings)


def test_what_needs_all_layers_is_refused_there():
    with pytest.raises(UsageError, match=f"dimension={D + 1}: all factors together have {D} values only"):
        attached(dimension=D + 1)
    with pytest.raises(UsageError, match="lr_ratio=2.0: nothing to tell apart: A and B are of one tensor"):
        attached(lr_ratio=2.0)
