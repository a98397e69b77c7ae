"""The optimizer of the pre-training."""

import pytest
import torch

from nemo_tiedlora.job.muon import Muon, orthogonal


@pytest.mark.parametrize("shape", [(3, 16, 16), (2, 8, 32), (1, 32, 8)])
def test_singular_values_become_alike(shape):
    torch.manual_seed(0)
    values = torch.linalg.svdvals(orthogonal(torch.randn(shape)))
    assert values.min() > 0.3 and values.max() < 1.3


def test_a_quadratic_goes_down():
    torch.manual_seed(0)
    weights = [torch.nn.Parameter(torch.randn(8, 4)), torch.nn.Parameter(torch.randn(4, 4))]
    optimizer = Muon(weights, lr=0.05)
    losses = []
    for _ in range(200):
        loss = sum(weight.square().sum() for weight in weights)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert losses[-1] < 0.1 * losses[0]
