"""A small plain torch model for tests of the variants."""

import torch
from torch import nn


class Layers(nn.Module):
    """A stack of rectangular projections, each back to the input's width by a fixed slice."""

    def __init__(self, layers=3, width=6, out=10, dtype=torch.float64, device=None):
        super().__init__()
        self.layers = nn.ModuleList(
            nn.ModuleDict({"qkv": nn.Linear(width, out, dtype=dtype, device=device)}) for _ in range(layers)
        )
        self.width = width

    def forward(self, x):
        for layer in self.layers:
            x = torch.tanh(layer["qkv"](x)[..., : self.width])
        return x


def train(model, steps=60, lr=1e-2, adapter=None):
    """A few AdamW steps on a fixed regression, attached to the adapter if it is given; returns the losses."""
    torch.manual_seed(0)
    dtype = next(model.parameters()).dtype
    x, target = torch.randn(16, 6, dtype=dtype), torch.rand(16, 6, dtype=dtype)
    parameters = adapter.parameter_groups() if adapter else [p for p in model.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(parameters, lr, weight_decay=0.01)
    if adapter:
        adapter.attach_to(optimizer)
    losses = []
    for _ in range(steps):
        loss = (model(x) - target).square().mean()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    return losses


def follows(adapter, reference):
    """Check an adapted model against a plain autograd reference, and its merged weights; return the trained keys."""
    model, named = adapter.model, adapter.named_tensors()
    x = torch.randn(4, 6, dtype=torch.float64)
    y = model(x)
    y.square().sum().backward()
    ours = {key: tensor.grad.clone() for key, tensor in named.items() if tensor.requires_grad}
    model.zero_grad()
    expected = reference(x)
    expected.square().sum().backward()
    torch.testing.assert_close(y, expected, rtol=1e-10, atol=1e-10)
    for key, gradient in ours.items():
        torch.testing.assert_close(gradient, named[key].grad, rtol=1e-10, atol=1e-10)
    torch.testing.assert_close(adapter.merge()(x), y, rtol=1e-10, atol=1e-10)
    return set(ours)
