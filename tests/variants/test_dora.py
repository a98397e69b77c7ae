"""DoRA over every method: the equation, its gradients, its start, and Hugging Face PEFT's DoRA."""

import pytest
import torch
from stack import Layers, train

from nemo_tiedlora import attach
from nemo_tiedlora.variants import ConditionalConfig, DynamicConfig, SharedConfig, Site, TiedConfig, build, count

COMMON = {"rank": 2, "alpha": 3.0, "dora": True}
CONFIGS = {
    "LoRA": TiedConfig(preset="LoRA", **COMMON),
    "TL6": TiedConfig(preset="TL6", **COMMON),
    "VeRA": TiedConfig(preset="VeRA", **COMMON),
    "ShareLoRA": SharedConfig(groups=[[0, 2]], **COMMON),
    "CondLoRA": ConditionalConfig(**COMMON),
    "DynaLoRA": DynamicConfig(inner="lora", active=3, **COMMON),
}


def adapted(config, randomised=True):
    torch.manual_seed(0)
    model = Layers()
    adapter = attach(model, config, ["qkv"])
    if randomised:
        with torch.no_grad():
            for key, tensor in adapter.named_tensors().items():
                tensor += (0.1 if key.endswith(".m") else 1.0) * torch.rand_like(tensor)
    return adapter, adapter.named_tensors()


def reference(model, named, x, config):
    """m / ‖W + ΔW‖ · (W + ΔW) x + b with the norm a constant, formed from whole matrices."""
    scale = config.alpha / config.rank
    for number, layer in enumerate(model.layers):
        linear = layer["qkv"]
        A, B, *_ = linear.adapter.factors().folded()
        whole = linear.weight + scale * B @ A
        length = torch.linalg.vector_norm(whole.detach(), dim=1)
        y = x @ whole.T * (named[f"qkv.{number}.m"] / length) + linear.bias
        x = torch.tanh(y[..., : x.shape[-1]])
    return x


@pytest.mark.parametrize("method", CONFIGS)
def test_forward_gradients_and_merge_follow_the_equation(method):
    adapter, named = adapted(CONFIGS[method])
    adapter.attach_to(torch.optim.SGD(adapter.parameter_groups(), lr=1.0))
    model, x = adapter.model, torch.randn(4, 6, dtype=torch.float64)
    y = model(x)
    y.square().sum().backward()
    trained = {key: tensor for key, tensor in named.items() if tensor.requires_grad}
    ours = {key: tensor.grad.clone() for key, tensor in trained.items()}
    model.zero_grad()
    expected = reference(model, named, x, CONFIGS[method])
    torch.testing.assert_close(y, expected, rtol=1e-10, atol=1e-10)
    expected.square().sum().backward()
    for key, gradient in ours.items():
        torch.testing.assert_close(gradient, trained[key].grad, rtol=1e-10, atol=1e-10)
    assert {key for key in ours if key.endswith(".m")} == {f"qkv.{number}.m" for number in range(3)}
    torch.testing.assert_close(adapter.merge()(x), y, rtol=1e-10, atol=1e-10)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
def test_it_starts_from_the_base_model(dtype):
    torch.manual_seed(0)
    model = Layers(dtype=dtype)
    x = torch.randn(4, 6, dtype=dtype)
    before = model(x)
    attach(model, TiedConfig(rank=2, dora=True), ["qkv"])
    torch.testing.assert_close(model(x), before, rtol=0, atol=4 * torch.finfo(dtype).eps)


@pytest.mark.parametrize("method", CONFIGS)
def test_training_lowers_the_loss(method):
    adapter, _ = adapted(CONFIGS[method], randomised=False)
    losses = train(adapter.model, adapter=adapter)
    assert losses[-1] < 0.9 * losses[0]


def test_agrees_with_hugging_face_dora():
    from peft import LoraConfig, get_peft_model

    adapter, named = adapted(CONFIGS["LoRA"])
    model = adapter.model
    torch.manual_seed(0)
    theirs = get_peft_model(Layers(), LoraConfig(r=2, lora_alpha=3, use_dora=True, target_modules=["qkv"]))
    with torch.no_grad():
        for number, layer in enumerate(theirs.base_model.model.layers):
            linear = layer["qkv"]
            linear.lora_A["default"].weight.copy_(named[f"qkv.{number}.A"])
            linear.lora_B["default"].weight.copy_(named[f"qkv.{number}.B"])
            linear.lora_magnitude_vector["default"].weight.copy_(named[f"qkv.{number}.m"])
    x = torch.randn(4, 6, dtype=torch.float64)
    ours, expected = model(x), theirs(x)
    torch.testing.assert_close(ours, expected, rtol=1e-10, atol=1e-10)
    ours.square().sum().backward()
    expected.square().sum().backward()
    for number, layer in enumerate(theirs.base_model.model.layers):
        their_m = layer["qkv"].lora_magnitude_vector["default"].weight.grad
        torch.testing.assert_close(named[f"qkv.{number}.m"].grad, their_m, rtol=1e-10, atol=1e-10)


def test_its_lengths_count_as_trained_and_as_active():
    site = Site("qkv", 0, 6, 10)
    variant = build(TiedConfig(preset="LoRA", rank=2, dora=True), 1)
    assert count(variant, [site]).trainable == variant.trained_at_once([site]) == 2 * 16 + 10
