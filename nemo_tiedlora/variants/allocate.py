"""Which modules train next: DynaLoRA's allocators (section 3.2).

Each takes the modules' importance and returns the numbers of those to be active. Ties, and the choice while no module
has a score yet, are drawn at random.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from random import Random
from typing import Any, Literal

Name = Literal["topk", "threshold", "stochastic", "discounted_stochastic", "random"]


@dataclass(frozen=True)
class Modules:
    """What is known of the modules to choose from.

    Args:
        importance: y_m of each.
        counts: C_m, one more than the steps that each was active for.
    """

    importance: Sequence[float]
    counts: Sequence[int]


#: (what is known, k or p, generator) → numbers of the active modules, in order. k is a whole number, p a share.
Allocator = Callable[[Modules, Any, Random], list[int]]


def normalised(importance: Sequence[float]) -> list[float]:
    """ŷ_m = y_m / Σ y; equal shares while there is nothing to divide.                              (equation 2)"""
    total = sum(importance)
    if not total:
        return [1 / len(importance)] * len(importance)
    return [score / total for score in importance]


def topk(modules: Modules, k: int, random: Random) -> list[int]:
    """The k most important modules."""
    return sorted(_ranking(modules.importance, random)[:k])


def threshold(modules: Modules, p: float, random: Random) -> list[int]:
    """The fewest most important modules whose shares of the importance add up to p; at least one."""
    shares = normalised(modules.importance)
    chosen, collected = [], 0.0
    for module in _ranking(modules.importance, random):
        chosen.append(module)
        collected += shares[module]
        if collected >= p - 1e-12:  # shares that add up to p on paper
            break
    return sorted(chosen)


def stochastic(modules: Modules, k: int, random: Random) -> list[int]:
    """k modules without replacement, with probabilities ŷ."""
    return _draw(normalised(modules.importance), k, random)


def discounted_stochastic(modules: Modules, k: int, random: Random) -> list[int]:
    """k modules without replacement, with weights ŷ_m / C_m: those active often are drawn less.   (equation 3)"""
    weights = [share / count for share, count in zip(normalised(modules.importance), modules.counts, strict=True)]
    return _draw(weights, k, random)


def random(modules: Modules, k: int, random: Random) -> list[int]:
    """k modules, all equally likely."""
    return sorted(random.sample(range(len(modules.importance)), k))


ALLOCATORS: dict[Name, Allocator] = {
    "topk": topk,
    "threshold": threshold,
    "stochastic": stochastic,
    "discounted_stochastic": discounted_stochastic,
    "random": random,
}


def _ranking(importance: Sequence[float], random: Random) -> list[int]:
    """Modules from the most important down."""
    order = list(range(len(importance)))
    random.shuffle(order)
    return sorted(order, key=lambda module: -importance[module])


def _draw(weights: Sequence[float], k: int, random: Random) -> list[int]:
    """k of the modules, one after the other, each with a probability in proportion to its weight."""
    left = dict(enumerate(weights))
    chosen = []
    for _ in range(k):
        module = random.choices(list(left), list(left.values()) if any(left.values()) else None)[0]
        chosen.append(module)
        del left[module]
    return sorted(chosen)
