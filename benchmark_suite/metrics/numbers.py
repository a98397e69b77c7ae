"""Metrics of generated numbers."""

import math
import re
import warnings
from collections.abc import Sequence
from dataclasses import replace
from typing import TYPE_CHECKING

from benchmark_suite.example import Example
from benchmark_suite.metrics.score import Score, mean

if TYPE_CHECKING:
    import numpy


#: What T5's evaluation (Raffel et al., arXiv:1910.10683) takes a text for that is no number.
NO_NUMBER = -1.0
_FINAL = re.compile(r"#### (\-?[0-9\.\,]+)")
_ANY = re.compile(r"(-?[$0-9.,]{2,})|(-?[0-9]+)")


def final_number(predictions: Sequence[str], examples: Sequence[Example]) -> Score:
    """Exact match of the number after ``####``, by GSM8K's official script (Cobbe et al., arXiv:2110.14168)."""
    return mean([_match(final_answer, *pair) for pair in zip(predictions, examples, strict=True)])


def last_number(predictions: Sequence[str], examples: Sequence[Example]) -> Score:
    """Exact match of the last number, with or without ``####``: lm-evaluation-harness's ``flexible-extract``."""
    return mean([_match(last_answer, *pair) for pair in zip(predictions, examples, strict=True)])


def final_answer(text: str) -> str | None:
    """The first number after ``####``, without commas, as it is written; None where there is none."""
    found = _FINAL.search(text)
    return found.group(1).replace(",", "") if found else None


def last_answer(text: str) -> str | None:
    """The last number of a text, without commas, dollar signs and a full stop; None where there is none."""
    found = [wide or narrow for wide, narrow in _ANY.findall(text)]
    return re.sub(r"\.$", "", re.sub(r"[,$]", "", found[-1])) if found else None


def pearson(predictions: Sequence[str], examples: Sequence[Example]) -> Score:
    """Pearson correlation of predicted and true numbers; 0 where one of them never varies."""
    from scipy.stats import pearsonr

    score = _correlation(pearsonr, predictions, examples)
    pairs = zip(map(number, predictions), (float(example.references[0]) for example in examples), strict=True)
    return replace(score, per_example=tuple((1.0, x, y, x * x, y * y, x * y) for x, y in pairs))


def pearson_of_sums(sums: "numpy.ndarray") -> "numpy.ndarray":
    """Pearson correlation from the sums of 1, x, y, x², y² and xy."""
    import numpy

    count, x, y, xx, yy, xy = sums.T
    spread = (count * xx - x * x) * (count * yy - y * y)
    varies = spread > 1e-9 * count**4
    return numpy.where(varies, (count * xy - x * y) / numpy.sqrt(numpy.where(varies, spread, 1.0)), 0.0)


def spearman(predictions: Sequence[str], examples: Sequence[Example]) -> Score:
    """Spearman rank correlation of predicted and true numbers; 0 where one of them never varies."""
    from scipy.stats import spearmanr

    return _correlation(spearmanr, predictions, examples)


def closeness(prediction: str, example: Example) -> float:
    """How far a number is from the true one, negative: 0 is best."""
    return -abs(number(prediction) - float(example.references[0]))


def number(text: str) -> float:
    """The number that a text is; -1 where it is none."""
    try:
        value = float(text.strip())
    except ValueError:
        return NO_NUMBER
    return value if math.isfinite(value) else NO_NUMBER


def _match(extract, prediction: str, example: Example) -> bool:
    # A reference that is not marked is the number itself.
    expected = {final_answer(reference) or last_answer(reference) for reference in example.references}
    predicted = extract(prediction)
    return predicted is not None and predicted in expected


def _correlation(correlate, predictions: Sequence[str], examples: Sequence[Example]) -> Score:
    predicted = [number(prediction) for prediction in predictions]
    expected = [float(example.references[0]) for example in examples]
    if len(expected) < 2:
        return Score(0.0, len(expected))
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # scipy's, on numbers that never vary
        value = float(correlate(predicted, expected).statistic)
    return Score(0.0 if math.isnan(value) else value, len(expected))
