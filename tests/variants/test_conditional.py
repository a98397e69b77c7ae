"""CondLoRA: the published count, the equations, and that factors are formed once per step."""

import pytest
import torch
from stack import Layers, follows, train

from nemo_tiedlora import attach
from nemo_tiedlora.errors import UsageError
from nemo_tiedlora.variants import ConditionalConfig, Site, build, count


def test_roberta_base_query_and_value_have_the_published_count():
    sites = [Site(target, layer, 768, 768) for target in ("attention_q", "attention_v") for layer in range(12)]
    assert count(build(ConditionalConfig(rank=8), 12), sites).trainable == 24_576


def randomised(groups=None, layers=3, out=10, **settings):
    torch.manual_seed(0)
    model = Layers(layers, out=out)
    adapter = attach(model, ConditionalConfig(rank=2, alpha=3.0, groups=groups, **settings), ["qkv"])
    with torch.no_grad():
        for tensor in adapter.named_tensors().values():
            tensor += torch.randn_like(tensor)
    return adapter, adapter.named_tensors()


def reference(model, named, x, groups):
    """x W_lᵀ + s (x (θ_Aᵀ W_l)ᵀ) (W_l θ_B)ᵀ, formed anew with plain autograd."""
    for number, layer in enumerate(model.layers):
        prefix = next((f"qkv.group{group[0]}." for group in groups if number in group), "qkv.")
        W, bias = layer["qkv"].weight.detach(), layer["qkv"].bias
        A, B = named[f"{prefix}theta_A"].T @ W, W @ named[f"{prefix}theta_B"]
        x = torch.tanh((x @ W.T + bias + 1.5 * (x @ A.T) @ B.T)[..., :6])
    return x


@pytest.mark.parametrize("groups", [[], [[0, 2]]])
def test_forward_gradients_and_merge_follow_the_equations(groups):
    adapter, named = randomised(groups)
    follows(adapter, lambda x: reference(adapter.model, named, x, groups))


def test_the_authors_orientation_is_of_the_turned_weight():
    def turned(model, named, x):
        for layer in model.layers:
            W, bias = layer["qkv"].weight.detach(), layer["qkv"].bias
            A, B = named["qkv.theta_A"].T @ W.T, W @ named["qkv.theta_B"]
            x = torch.tanh(x @ W.T + bias + 1.5 * (x @ A.T) @ B.T)
        return x

    adapter, named = randomised(out=6, orientation="authors")
    follows(adapter, lambda x: turned(adapter.model, named, x))


def test_the_authors_orientation_is_for_square_weights():
    with pytest.raises(UsageError, match=r"orientation='authors': is for square weights; qkv has shape \(10, 6\)"):
        randomised(orientation="authors")


def test_micro_batches_reuse_the_factors_and_their_gradients_add_up():
    adapter, named = randomised()
    model, batches = adapter.model, torch.randn(3, 4, 6, dtype=torch.float64)
    adapter.attach_to(torch.optim.SGD(adapter.parameter_groups(), lr=0.1))
    formed = count_products(lambda: [model(batch).square().sum().backward() for batch in batches])
    once = count_products(lambda: model(batches[0]))
    assert formed > 0 and once == 0
    ours = {key: tensor.grad.clone() for key, tensor in named.items()}
    model.zero_grad()
    sum(reference(model, named, batch, []).square().sum() for batch in batches).backward()
    for key, gradient in ours.items():
        torch.testing.assert_close(gradient, named[key].grad, rtol=1e-10, atol=1e-10)


def count_products(call):
    """Forward products with a whole weight on the left or right and a θ on the other side."""
    from torch.utils._python_dispatch import TorchDispatchMode

    found = []

    class Record(TorchDispatchMode):
        def __torch_dispatch__(self, function, types, args=(), kwargs=None):
            if "mm" in str(function) and not torch.is_grad_enabled():
                shapes = {tuple(arg.shape) for arg in args if isinstance(arg, torch.Tensor)}
                if shapes & {(2, 10), (6, 2)} and shapes & {(10, 6)}:
                    found.append(shapes)
            return function(*args, **(kwargs or {}))

    with Record():
        call()
    return len(found)


class WritesData(torch.optim.Optimizer):
    """Updates parameters as fused and main-copy optimizers do, behind autograd's back."""

    def __init__(self, parameters):
        super().__init__(parameters, {})

    def step(self):
        for parameter in self.param_groups[0]["params"]:
            parameter.data.mul_(1.5)


@pytest.mark.parametrize("attached", [True, False])
@pytest.mark.parametrize("optimizer", [WritesData, lambda thetas: torch.optim.AdamW(thetas, lr=0.1, fused=True)])
def test_an_optimizer_step_forms_them_anew(optimizer, attached):
    """Also where nobody counts steps, and whatever was formed for validation before and after."""
    adapter, named = randomised()
    model, x = adapter.model, torch.randn(4, 6, dtype=torch.float64)
    optimizer = optimizer(named.values())
    if attached:
        adapter.attach_to(optimizer)

    def validated():
        with torch.no_grad():
            outputs = [model(x), model(x)]
        assert torch.equal(*outputs)
        torch.testing.assert_close(outputs[0], reference(model, named, x, []), rtol=1e-10, atol=1e-10)
        return outputs[0]

    seen = [validated()]
    for _ in range(2):
        model(x).sum().backward()
        validated()
        optimizer.step()
        seen.append(validated())
        optimizer.zero_grad()
    assert not torch.equal(seen[0], seen[1]) and not torch.equal(seen[1], seen[2])


def test_a_step_forms_those_of_layers_that_were_left_out_anew():
    adapter, named = randomised()
    optimizer = torch.optim.AdamW(named.values(), lr=0.1, fused=True)
    x = torch.randn(4, 6, dtype=torch.float64)
    with torch.no_grad():
        adapter.model(x)
    adapter.model.layers[0]["qkv"](x).sum().backward()
    optimizer.step()
    optimizer.zero_grad()
    with torch.no_grad():
        torch.testing.assert_close(adapter.model(x), reference(adapter.model, named, x, []), rtol=1e-10, atol=1e-10)


def test_generation_forms_them_once():
    adapter, _ = randomised()
    x = torch.randn(4, 6, dtype=torch.float64)
    with torch.no_grad():
        assert count_products(lambda: adapter.model(x)) > 0 and count_products(lambda: adapter.model(x)) == 0


def test_factors_formed_for_inference_can_be_trained_and_moved():
    adapter, named = randomised()
    model = adapter.model
    x = torch.randn(4, 6, dtype=torch.float64)
    with torch.inference_mode():
        model(x)
    model(x).sum().backward()
    assert named["qkv.theta_A"].grad.abs().max() > 0
    assert model.float()(x.float()).dtype == torch.float32


def test_it_starts_from_the_base_and_learns():
    model = Layers()
    x = torch.randn(4, 6, dtype=torch.float64)
    before = model(x)
    frozen = [layer["qkv"].weight.clone() for layer in model.layers]
    attach(model, ConditionalConfig(rank=2), ["qkv"])
    assert torch.equal(model(x), before)
    losses = train(model, steps=120, lr=3e-2)
    assert losses[-1] < 0.95 * losses[0]
    assert all(torch.equal(layer["qkv"].weight, W) for layer, W in zip(model.layers, frozen, strict=True))
