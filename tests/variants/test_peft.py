"""VeRA and LoRA against Hugging Face PEFT, given the same matrices and vectors."""

import copy

import pytest
import torch
from stack import Layers

from nemo_tiedlora import attach
from nemo_tiedlora.variants import TiedConfig


@pytest.fixture
def both():
    """Two equal float64 stacks, their inputs, and the tensors to give both adapters."""
    torch.manual_seed(0)
    model = Layers()
    x = torch.randn(4, 6, dtype=torch.float64)
    A, B = torch.randn(3, 2, 6, dtype=torch.float64), torch.randn(3, 10, 2, dtype=torch.float64)
    u, v = torch.randn(3, 2, dtype=torch.float64), torch.randn(3, 10, dtype=torch.float64)
    return model, copy.deepcopy(model), x, {"A": A, "B": B, "u": u, "v": v}


def compare(ours, theirs, x, our_tensors, their_tensors):
    """Outputs and gradients agree; the tensors come in the same order on both sides."""
    y, expected = ours(x), theirs(x)
    torch.testing.assert_close(y, expected, rtol=1e-10, atol=1e-10)
    y.square().sum().backward()
    expected.square().sum().backward()
    for tensor, reference in zip(our_tensors, their_tensors, strict=True):
        torch.testing.assert_close(tensor.grad, reference.grad, rtol=1e-10, atol=1e-10)


def test_lora(both):
    from peft import LoraConfig, get_peft_model

    model, other, x, tensors = both
    named = attach(model, TiedConfig(preset="LoRA", rank=2, alpha=6.0), ["qkv"]).named_tensors()
    theirs = get_peft_model(other, LoraConfig(r=2, lora_alpha=6, target_modules=["qkv"])).double()
    layers = [layer["qkv"] for layer in other.layers]
    pairs = []
    with torch.no_grad():
        for number, layer in enumerate(layers):
            for part, weight in (("A", layer.lora_A.default.weight), ("B", layer.lora_B.default.weight)):
                named[f"qkv.{number}.{part}"].copy_(tensors[part][number])
                weight.copy_(tensors[part][number])
                pairs.append((named[f"qkv.{number}.{part}"], weight))
    compare(model, theirs, x, *zip(*pairs, strict=True))


def test_vera(both):
    from peft import VeraConfig, get_peft_model

    model, other, x, tensors = both
    named = attach(model, TiedConfig(preset="VeRA", rank=2), ["qkv"]).named_tensors()
    theirs = get_peft_model(other, VeraConfig(r=2, target_modules=["qkv"], save_projection=True)).double()
    layers = [layer["qkv"] for layer in other.layers]
    pairs = []
    with torch.no_grad():
        for part in "AB":
            named[f"qkv.{part}"].copy_(tensors[part][0])
        for number, layer in enumerate(layers):
            layer.vera_A["default"].data, layer.vera_B["default"].data = tensors["A"][0], tensors["B"][0]
            for part, vector in (("u", layer.vera_lambda_d["default"]), ("v", layer.vera_lambda_b["default"])):
                named[f"qkv.{number}.{part}"].copy_(tensors[part][number])
                vector.copy_(tensors[part][number])
                pairs.append((named[f"qkv.{number}.{part}"], vector))
    compare(model, theirs, x, *zip(*pairs, strict=True))
