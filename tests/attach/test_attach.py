"""Adapters go onto a plain torch model and come off again; what does not fit leaves it as it was."""

import re
from collections import OrderedDict
from pathlib import Path

import pytest
import torch
from stack import Layers, train

from nemo_tiedlora import attach
from nemo_tiedlora.errors import UsageError
from nemo_tiedlora.variants import TiedConfig


def state(model):
    return [(name, type(module), id(module)) for name, module in model.named_modules()], [
        (name, parameter.requires_grad) for name, parameter in model.named_parameters()
    ]


def test_a_method_by_name_is_the_same_as_by_its_config():
    torch.manual_seed(0)
    by_name = attach(Layers(), "tied_lora", ["qkv"], preset="TL5", rank=2, seed=3).named_tensors()
    by_config = attach(Layers(), TiedConfig(preset="TL5", rank=2, seed=3), ["qkv"]).named_tensors()
    assert by_name.keys() == by_config.keys() == {"qkv.A", "qkv.B"}
    for key, tensor in by_name.items():
        assert torch.equal(tensor, by_config[key])


def test_merging_gives_the_model_back_with_the_adapter_in_its_weights():
    torch.manual_seed(0)
    model, x = Layers(), torch.randn(4, 6, dtype=torch.float64)
    modules, _ = state(model)
    adapter = attach(model, "vera", ["qkv"], rank=2)
    train(model, steps=5)
    y = model(x)
    assert adapter.merge() is model
    assert state(model)[0] == modules
    torch.testing.assert_close(model(x), y, rtol=1e-10, atol=1e-10)
    attach(model, "vera", ["qkv"], rank=2)  # there is room again


@pytest.mark.parametrize(
    ("method", "targets", "settings", "message"),
    [
        ("tied_lora", ["qkv"], {"rank": 7}, "rank=7: larger than the layer"),
        ("tied_lora", ["qkw"], {}, "targets='qkw': no linear layer has this name; did you mean 'qkv'"),
        ("tied_lora", "qkv", {}, "targets='qkv': write a list"),
        ("tied_lora", [], {}, "targets=.*: write a list"),
        ("tide_lora", ["qkv"], {}, "did you mean 'tied_lora'"),
        ("tied_lora", ["qkv"], {"ranc": 2}, "ranc=2: unknown setting; did you mean 'rank'"),
        (TiedConfig(), ["qkv"], {"rank": 2}, "settings={'rank': 2}: write them into the TiedConfig"),
        ("tied_lora", ["qkv"], {"rank": 2, "layer_selection": [1, 4]}, "layer_selection=4: the model has layers 1"),
        ("dyna_lora", ["qkv"], {"rank": 2, "active": 4}, "active=4: there are 3 modules"),
    ],
)
def test_what_does_not_fit_is_refused_and_changes_nothing(method, targets, settings, message):
    model = Layers()
    before = state(model)
    with pytest.raises(UsageError, match=message):
        attach(model, method, targets, **settings)
    assert state(model) == before


def test_a_second_adapter_of_the_same_name_is_refused():
    model = Layers()
    attach(model, "tied_lora", ["qkv"], rank=2)
    before = state(model)
    with pytest.raises(UsageError, match="name='adapter': the model has an adapter of this name already"):
        attach(model, "vera", ["qkv"], rank=2)
    assert state(model) == before


def test_the_readmes_lines_train_and_merge():
    readme = (Path(__file__).parents[2] / "README.md").read_text()
    (code,) = (block for block in re.findall(r"```python\n(.*?)```", readme, re.DOTALL) if "attach" in block)
    torch.manual_seed(0)
    model = torch.nn.Sequential(OrderedDict((name, torch.nn.Linear(8, 8)) for name in ("q_proj", "v_proj")))
    scope, x = {"model": model, "torch": torch}, torch.randn(4, 8)
    before, after = code.split("...\n")
    exec(before, scope)
    model(x).square().sum().backward()
    scope["optimizer"].step()
    y = model(x)
    exec(after, scope)
    assert type(model.q_proj) is torch.nn.Linear
    torch.testing.assert_close(model(x), y)


def test_the_model_is_as_it_was_without_the_adapter():
    torch.manual_seed(0)
    model, x = Layers(), torch.randn(4, 6, dtype=torch.float64)
    model.layers[1].requires_grad_(False)
    before, y = state(model), model(x)
    adapter = attach(model, "tied_lora", ["qkv"], rank=2)
    with torch.no_grad():
        adapter.named_tensors()["qkv.0.v"].normal_()
    adapted = model(x)
    assert not torch.equal(adapted, y)
    with adapter.disabled():
        assert torch.equal(model(x), y)
    assert torch.equal(model(x), adapted)
    adapter.merge()
    torch.testing.assert_close(model(x), adapted, rtol=1e-10, atol=1e-10)
    assert state(model) == before
    adapter.unmerge()
    torch.testing.assert_close(model(x), adapted, rtol=1e-10, atol=1e-10)
    assert adapter.detach() is model and state(model) == before
    torch.testing.assert_close(model(x), y, rtol=1e-10, atol=1e-10)
    with pytest.raises(UsageError, match="is off the model already"):
        adapter.merge()


def test_what_cannot_be_merged_or_taken_out_says_so():
    adapter = attach(Layers(), "cond_lora", ["qkv"], rank=2)
    with pytest.raises(UsageError, match="is not merged"):
        adapter.unmerge()
    with torch.no_grad():
        adapter.named_tensors()["qkv.theta_B"][0, 0] = float("nan")
    with pytest.raises(UsageError, match=r"adapter='qkv.theta_B': has NaN"):
        adapter.merge()
    with torch.no_grad():
        adapter.named_tensors()["qkv.theta_B"].zero_()
    adapter.merge()
    with pytest.raises(UsageError, match="cannot be taken out: CondLoRA formed it"):
        adapter.unmerge()
