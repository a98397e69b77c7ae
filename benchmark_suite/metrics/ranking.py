"""Metrics of ranked choices; a prediction is the log-likelihood of each choice, in their order.

Definitions are those of lm-evaluation-harness; equally likely choices are decided for the first.
"""

from collections.abc import Sequence
from typing import TYPE_CHECKING

from benchmark_suite.example import Example
from benchmark_suite.metrics.score import Score, mean

if TYPE_CHECKING:
    import numpy


Likelihoods = Sequence[float]


def acc(predictions: Sequence[Likelihoods], examples: Sequence[Example]) -> Score:
    """Whether the right choice is the likeliest."""
    return mean([correct(*pair) for pair in zip(predictions, examples, strict=True)])


def acc_norm(predictions: Sequence[Likelihoods], examples: Sequence[Example]) -> Score:
    """Whether the right choice is the likeliest per character."""
    return mean([_normalised(*pair) == pair[1].label for pair in zip(predictions, examples, strict=True)])


def f1(predictions: Sequence[Likelihoods], examples: Sequence[Example]) -> Score:
    """F1 of choice 1 against choice 0."""
    from sklearn.metrics import f1_score

    gold, predicted = _labels(predictions, examples)
    counts = tuple((float(g * p), float(g + p)) for g, p in zip(gold, predicted, strict=True))
    return Score(float(f1_score(gold, predicted, zero_division=0.0)), len(examples), counts)


def f1_of_counts(sums: "numpy.ndarray") -> "numpy.ndarray":
    """F1 from how often both are 1, and how often each is, added."""
    import numpy

    both, each = sums.T
    return 2 * both / numpy.maximum(each, 1)


def mcc(predictions: Sequence[Likelihoods], examples: Sequence[Example]) -> Score:
    """Matthews correlation."""
    from sklearn.metrics import matthews_corrcoef

    gold, predicted = _labels(predictions, examples)
    kinds = len(examples[0].choices)
    counts = tuple(
        tuple(float(cell == g * kinds + p) for cell in range(kinds * kinds))
        for g, p in zip(gold, predicted, strict=True)
    )
    return Score(float(matthews_corrcoef(gold, predicted)), len(examples), counts)


def mcc_of_counts(sums: "numpy.ndarray") -> "numpy.ndarray":
    """Matthews correlation from a confusion matrix, row by row; 0 where one side never varies."""
    import numpy

    kinds = round(sums.shape[1] ** 0.5)
    matrix = sums.reshape(-1, kinds, kinds)
    count, right = matrix.sum((1, 2)), numpy.trace(matrix, axis1=1, axis2=2)
    gold, predicted = matrix.sum(2), matrix.sum(1)
    spread = (count**2 - (gold**2).sum(1)) * (count**2 - (predicted**2).sum(1))
    return (right * count - (gold * predicted).sum(1)) / numpy.sqrt(numpy.where(spread > 0, spread, numpy.inf))


def correct(prediction: Likelihoods, example: Example) -> float:
    """1 if the right choice is the likeliest, else 0."""
    return float(likeliest(prediction) == example.label)


def likeliest(prediction: Likelihoods) -> int:
    """The number of the likeliest choice."""
    return max(range(len(prediction)), key=prediction.__getitem__)


def _normalised(prediction: Likelihoods, example: Example) -> int:
    return likeliest([value / len(choice) for value, choice in zip(prediction, example.choices, strict=True)])


def _labels(predictions: Sequence[Likelihoods], examples: Sequence[Example]) -> tuple[list[int], list[int]]:
    return [example.right for example in examples], [likeliest(prediction) for prediction in predictions]
