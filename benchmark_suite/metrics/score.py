"""What a metric is, and what it gives."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Literal

from benchmark_suite.example import Example

if TYPE_CHECKING:
    import numpy

#: How a model answers: with a text, or with a number for each choice.
Kind = Literal["generate", "rank"]
#: Predictions of a whole split, and its examples in the same order.
Compute = Callable[[Sequence[Any], Sequence[Example]], "Score"]


@dataclass(frozen=True)
class Score:
    """A metric over a split.

    Args:
        value: over all examples.
        count: how many examples.
        per_example: of every example its value, where ``value`` is their mean; or the numbers whose sums over examples
            give ``value`` by the metric's ``combine``; None where there is neither.
        signature: how it was computed, where a library has settings that matter.
    """

    value: float
    count: int
    per_example: tuple[float, ...] | tuple[tuple[float, ...], ...] | None = None
    signature: str | None = None


@dataclass(frozen=True)
class Metric:
    """A metric by what it is for.

    Args:
        prediction: the kind of prediction it takes: ``generate`` (a text) or ``rank`` (a number for each choice).
        compute: predictions and examples → ``Score``.
        reward: prediction and example → a number that is higher for a better one, for metrics without values for
            single examples; None: the value itself.
        scale: what a value is multiplied by in tables: 100 prints fractions and correlations as papers do.
        choices: whether it looks at an example's choices and label.
        combine: sums over examples, (corpora, numbers per example) → the value for each corpus; None for a mean.
    """

    prediction: Kind
    compute: Compute
    reward: Callable[[Any, Example], float] | None = None
    scale: float = 100.0
    choices: bool = False
    combine: "Callable[[numpy.ndarray], numpy.ndarray] | None" = None


def mean(per_example: Sequence[float], signature: str | None = None) -> Score:
    """The score whose value is the mean of ``per_example``."""
    values = tuple(float(value) for value in per_example)
    return Score(sum(values) / len(values), len(values), values, signature)
