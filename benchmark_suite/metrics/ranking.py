"""Metrics of ranked choices; a prediction is the log-likelihood of each choice, in their order.

Definitions are those of lm-evaluation-harness; equally likely choices are decided for the first.
"""

from collections.abc import Sequence
from typing import TYPE_CHECKING

from benchmark_suite.metrics.score import Score, mean

if TYPE_CHECKING:
    from benchmark_suite.task import Example

Likelihoods = Sequence[float]


def acc(predictions: Sequence[Likelihoods], examples: Sequence["Example"]) -> Score:
    """Whether the right choice is the likeliest."""
    return mean([correct(*pair) for pair in zip(predictions, examples, strict=True)])


def acc_norm(predictions: Sequence[Likelihoods], examples: Sequence["Example"]) -> Score:
    """Whether the right choice is the likeliest per character."""
    return mean([_normalised(*pair) == pair[1].label for pair in zip(predictions, examples, strict=True)])


def f1(predictions: Sequence[Likelihoods], examples: Sequence["Example"]) -> Score:
    """F1 of choice 1 against choice 0."""
    from sklearn.metrics import f1_score

    gold, predicted = _labels(predictions, examples)
    return Score(float(f1_score(gold, predicted, zero_division=0.0)), len(examples))


def mcc(predictions: Sequence[Likelihoods], examples: Sequence["Example"]) -> Score:
    """Matthews correlation."""
    from sklearn.metrics import matthews_corrcoef

    return Score(float(matthews_corrcoef(*_labels(predictions, examples))), len(examples))


def correct(prediction: Likelihoods, example: "Example") -> float:
    """1 if the right choice is the likeliest, else 0."""
    return float(likeliest(prediction) == example.label)


def likeliest(prediction: Likelihoods) -> int:
    """The number of the likeliest choice."""
    return max(range(len(prediction)), key=prediction.__getitem__)


def _normalised(prediction: Likelihoods, example: "Example") -> int:
    return likeliest([value / len(choice) for value, choice in zip(prediction, example.choices, strict=True)])


def _labels(predictions: Sequence[Likelihoods], examples: Sequence["Example"]) -> tuple[list[int], list[int]]:
    return [example.label for example in examples], [likeliest(prediction) for prediction in predictions]
