"""Muon: momentum whose matrix is made orthogonal before each step (Jordan et al., 2024, github.com/KellerJordan/Muon).

With it the base's look-ups appear after a few hundred steps. With AdamW alone, a thousand steps showed no sign of them:
the difference between pre-training in a minute and not at all.
"""

from __future__ import annotations

import torch


class Muon(torch.optim.Optimizer):
    """For weight matrices; everything else (embeddings, norms, the output layer) is left to AdamW.

    Args:
        lr: learning rate, on the scale of AdamW's: steps are as long as AdamW's typical ones.
    """

    def __init__(self, matrices, lr: float, momentum: float = 0.95, weight_decay: float = 0.0):
        super().__init__(matrices, dict(lr=lr, momentum=momentum, weight_decay=weight_decay))

    @torch.no_grad()
    def step(self) -> None:
        for group in self.param_groups:
            for weights in _by_shape(group["params"]):
                directions = []
                for weight in weights:
                    average = self.state[weight].setdefault("average", torch.zeros_like(weight))
                    average.lerp_(weight.grad, 1 - group["momentum"])
                    directions.append(weight.grad.lerp(average, group["momentum"]))
                # All layers at once: for small matrices the number of calls is what takes the time.
                for weight, direction in zip(weights, orthogonal(torch.stack(directions)), strict=True):
                    weight.mul_(1 - group["lr"] * group["weight_decay"])
                    weight.add_(direction, alpha=-0.2 * max(weight.shape) ** 0.5 * group["lr"])


def _by_shape(weights: list[torch.Tensor]) -> list[list[torch.Tensor]]:
    groups = {}
    for weight in weights:
        groups.setdefault(weight.shape, []).append(weight)
    return list(groups.values())


def orthogonal(matrices: torch.Tensor, steps: int = 5) -> torch.Tensor:
    """The matrices with all their singular values brought close to one, by Newton-Schulz iteration."""
    tall = matrices.shape[-2] > matrices.shape[-1]
    x = matrices.mT if tall else matrices
    x = x / (x.norm(dim=(-2, -1), keepdim=True) + 1e-7)
    for _ in range(steps):
        gram = x @ x.mT
        x = 3.4445 * x + (-4.775 * gram + 2.0315 * gram @ gram) @ x
    return x.mT if tall else x
