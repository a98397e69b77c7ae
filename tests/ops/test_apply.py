"""The fused apply against plain autograd, and what it keeps for backward."""

import pytest
import torch

from nemo_tiedlora.ops import Exchange, apply

SHAPES = {"rows": (5,), "sequence and batch": (5, 3), "one token": (1, 1)}


def tensors(leading, dtype=torch.float64, rank=2, features=(7, 11)):
    torch.manual_seed(0)
    fan_in, fan_out = features
    x = torch.randn(*leading, fan_in, dtype=dtype)
    W, A, B = (torch.randn(*shape, dtype=dtype) for shape in ((fan_out, fan_in), (rank, fan_in), (fan_out, rank)))
    return x, W, A, B


@pytest.mark.parametrize("leading", SHAPES.values(), ids=SHAPES)
@pytest.mark.parametrize("wanted", ["xABu", "AB", "xB", "xA", "A", "B", "x", "u", "xu", "uB"])
def test_output_and_gradients_equal_plain_autograd(leading, wanted):
    x, W, A, B = tensors(leading)
    u = torch.randn(len(A), dtype=torch.float64) if "u" in wanted else None
    results = []
    for add in (
        lambda y, x, A, B, u: apply(y, x, A, B, 0.75, u=u),
        lambda y, x, A, B, u: y + 0.75 * (x @ (A if u is None else u[:, None] * A).T) @ B.T,
    ):
        leaves = {"x": x.clone(), "A": A.clone(), "B": B.clone(), "u": None if u is None else u.clone()}
        for name in wanted:
            leaves[name].requires_grad_()
        y = add(leaves["x"] @ W.T, leaves["x"], leaves["A"], leaves["B"], leaves["u"])
        y.square().sum().backward()
        results.append((y, *(leaves[name].grad for name in wanted)))
    for ours, reference in zip(*results, strict=True):
        torch.testing.assert_close(ours, reference, rtol=1e-12, atol=1e-12)


def test_gradcheck():
    x, W, A, B = (tensor.requires_grad_() for tensor in tensors((3, 2)))
    u = torch.rand(len(A), dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(lambda x, W, A, B, u: apply(x @ W.T, x, A, B, 0.5, u=u), (x, W, A, B, u))


def saved_sizes(x, W, A, B, u=None):
    sizes = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: sizes.append(t.numel()) or t, lambda t: t):
        apply(torch.nn.functional.linear(x, W), x, A, B, 1.0, u=u)
    return sizes


def test_keeps_nothing_as_large_as_the_output_and_no_input_for_a_frozen_a():
    tokens, fan_in, fan_out, rank = 64, 16, 48, 4
    x, W, A, B = tensors((tokens,), rank=rank, features=(fan_in, fan_out))
    x.requires_grad_()
    B.requires_grad_()
    frozen = saved_sizes(x, W, A, B)
    assert tokens * fan_in not in frozen and tokens * fan_out not in frozen
    assert tokens * rank in frozen
    with_u = saved_sizes(x, W, A, B, torch.ones(rank, dtype=torch.float64, requires_grad=True))
    assert tokens * fan_in not in with_u and tokens * fan_out not in with_u
    trained = saved_sizes(x, W, A.clone().requires_grad_(), B)
    assert tokens * fan_in in trained and tokens * fan_out not in trained


def test_folds_every_scale_into_the_small_factors():
    """u, v and alpha cost no operation of the size of an activation: beside x Aᵀ and + h Bᵀ there is none."""
    from torch.utils._python_dispatch import TorchDispatchMode

    from nemo_tiedlora.variants import Bank, FrozenWeight, Site, TiedConfig, build

    tokens, fan_in, fan_out = 512, 32, 48
    site = Site("t", 0, fan_in, fan_out)
    bank = Bank(build(TiedConfig(preset="TL6", rank=4, alpha=6), 1))
    bank.adopt(torch.nn.Module(), site, FrozenWeight(torch.zeros(fan_out, fan_in)))
    x, y = torch.randn(tokens, fan_in), torch.randn(tokens, fan_out)
    large = []

    class Record(TorchDispatchMode):
        def __torch_dispatch__(self, function, types, args=(), kwargs=None):
            result = function(*args, **(kwargs or {}))
            sizes = [value.numel() for value in (*args, result) if isinstance(value, torch.Tensor)]
            if (
                max(sizes, default=0) >= tokens * fan_in
                and "view" not in str(function)
                and "detach" not in str(function)
            ):
                large.append(str(function))
            return result

    with Record():
        apply(y, x, *bank.factors(site, None))
    assert large == ["aten.mm.default", "aten.addmm_.default"]


def test_writes_into_the_base_output():
    x, W, A, B = tensors((5, 3))
    y = x @ W.T
    assert apply(y, x, A, B, 1.0).data_ptr() == y.data_ptr()


def test_leaves_a_view_alone():
    x, W, A, B = tensors((5, 3))
    whole = x @ W.T
    view, before = whole[:], whole.clone()
    y = apply(view, x, A, B, 1.0)
    assert torch.equal(whole, before)
    torch.testing.assert_close(y, before + (x @ A.T) @ B.T)


def test_computes_in_the_output_dtype():
    x, W, A, B = tensors((5, 3), dtype=torch.float32)
    y = apply((x @ W.T).bfloat16(), x, A.requires_grad_(), B.requires_grad_(), 1.0)
    y.sum().backward()
    assert y.dtype == torch.bfloat16
    assert A.grad.dtype == B.grad.dtype == torch.float32


def test_ranks_exchange_rank_sized_values_only():
    x, W, A, B = (tensor.requires_grad_() for tensor in tensors((5, 3)))
    seen = []
    exchange = Exchange(lambda h: seen.append(h.shape) or h, lambda grad: seen.append(grad.shape) or grad)
    apply(x @ W.T, x, A, B, 1.0, exchange=exchange).sum().backward()
    assert seen == [(15, 2), (15, 2)]
