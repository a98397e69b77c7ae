"""How adapter tensors start, and how a frozen one is drawn again exactly as it was."""

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Final, Literal, get_args

import torch

from nemo_tiedlora.errors import UsageError, check_choice
from nemo_tiedlora.variants import drawing, drawing_by_torch

#: How a random matrix starts.
Distribution = Literal["normal", "kaiming_uniform", "kaiming_normal", "xavier"]
#: How any tensor starts.
Kind = Literal[Distribution, "constant", "integers", "computed"]
#: Standard deviation of each distribution for a matrix of shape (fan_out, fan_in).
STD: dict[str, Callable[[int, int], float]] = {
    "normal": lambda fan_out, fan_in: 1 / math.sqrt(fan_in),
    "kaiming_uniform": lambda fan_out, fan_in: 1 / math.sqrt(3 * fan_in),  # a = sqrt(5), as torch.nn.Linear starts
    "kaiming_normal": lambda fan_out, fan_in: math.sqrt(2 / fan_in),
    "xavier": lambda fan_out, fan_in: math.sqrt(2 / (fan_in + fan_out)),
}
#: Starts as ``value`` everywhere.
CONSTANT: Final = "constant"
#: Whole numbers, all equally likely: indices.
INTEGERS: Final = "integers"
#: Starts as the method computes it from the layer's frozen weight (``Variant.computed``), to bits that no other machine
#: need compute again.
COMPUTED: Final = "computed"
#: How random values are drawn, by the number that adapter files record.
RULES = {rule.RULE: rule for rule in (drawing, drawing_by_torch)}


@dataclass(frozen=True)
class Init:
    """A named start value.

    Args:
        kind: ``normal`` (std 1/sqrt(fan_in), so that it does not depend on the width), ``kaiming_uniform``
            (a=sqrt(5)), ``kaiming_normal``, ``xavier`` (normal), ``constant``, ``integers`` or ``computed``.
        std: standard deviation to use in place of the one that ``kind`` derives from the shape.
        value: of ``constant``.
        below: of ``integers``: they are 0 to ``below`` − 1.

    Raises:
        UsageError: for an unknown kind or a standard deviation that is not positive.
    """

    kind: Kind
    std: float | None = None
    value: float = 0.0
    below: int = 0

    def __post_init__(self):
        check_choice("init", self.kind, get_args(Kind))
        if self.std is not None and (self.kind not in STD or not self.std > 0):
            raise UsageError("std", self.std, f"must be > 0, and goes with {', '.join(STD)} only")

    @property
    def random(self) -> bool:
        return self.kind in STD

    def unit(self, shape: tuple[int, ...]) -> float:
        """The size of the random values of a tensor of this shape: their standard deviation, of integers their bound; 1
        for one that is not random."""
        if self.kind == INTEGERS:
            return float(self.below)
        return (self.std or STD[self.kind](*shape)) if self.random else 1.0

    def draw(self, shape: tuple[int, ...], seed: int, key: str, rule: int = drawing.RULE) -> torch.Tensor:
        """The whole (unsharded) tensor called ``key``: float32, of ``integers`` int32.

        Depends on ``seed``, ``key`` and ``shape`` alone: not on the order of creation, on other tensors, on the
        parallel layout or, by the present rule, on the machine: every rank and every later process draws the same bits.

        Args:
            rule: a key of ``RULES``; another than the present one only for adapters that were made with it.
        """
        if self.kind == INTEGERS:
            return torch.as_tensor(drawing.integers(shape, self.below, seed, key))
        if not self.random:
            return torch.full(shape, self.value)
        drawn, unit = RULES[rule], self.unit(shape)
        if self.kind == "kaiming_uniform":
            return torch.as_tensor(drawn.uniform(shape, math.sqrt(3) * unit, seed, key))
        return torch.as_tensor(drawn.normal(shape, unit, seed, key))


def constant(value: float) -> Init:
    """The same value everywhere."""
    return Init(CONSTANT, value=value)


ZEROS = constant(0.0)
