"""Whether two variants differ by more than chance: paired bootstrap over examples, paired t-test over seeds."""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy

RESAMPLES = 10_000
SEED = 0
#: Resamples drawn at once: enough to be fast, few enough to fit in memory for any number of examples.
BLOCK = 500


@dataclass(frozen=True)
class Bootstrap:
    """The mean difference over ``examples``, its 95 % interval and a two-sided p-value."""

    difference: float
    low: float
    high: float
    p: float
    examples: int


def bootstrap(differences: Sequence[float]) -> Bootstrap:
    """Resample paired differences, one per example, 10,000 times with a fixed seed.

    p is the share of resamples whose mean strays from the observed one by at least as much as that strays from 0,
    with one added to both counts so that it is never 0.
    """
    # A resample's mean depends only on how often each distinct value was drawn, so drawing those counts is exact
    # and for 0/1 scores takes three numbers in place of one per example.
    values, counts = numpy.unique(numpy.asarray(differences, dtype=float), return_counts=True)
    examples = int(counts.sum())
    observed = float(values @ counts) / examples
    generator = numpy.random.default_rng(SEED)
    draws = (generator.multinomial(examples, counts / examples, size=BLOCK) for _ in range(RESAMPLES // BLOCK))
    means = numpy.concatenate([draw @ values for draw in draws]) / examples
    # Sums of the same numbers in another order differ by rounding; that must not decide a tie.
    tolerance = 1e-12 * max(1.0, float(numpy.abs(values).max()))
    extreme = int((numpy.abs(means - observed) >= abs(observed) - tolerance).sum())
    low, high = numpy.quantile(means, [0.025, 0.975])
    return Bootstrap(observed, float(low), float(high), (extreme + 1) / (RESAMPLES + 1), examples)


def t_test(first: Sequence[float], second: Sequence[float]) -> float | None:
    """p of the two-sided paired t-test; None with fewer than two pairs or when all pairs differ alike."""
    from scipy.stats import ttest_rel

    differences = numpy.subtract(first, second)
    # The statistic divides by the spread of the differences.
    if len(differences) < 2 or numpy.ptp(differences) <= 1e-12 * max(1.0, float(numpy.abs(differences).max())):
        return None
    return float(ttest_rel(first, second).pvalue)


def holm(p_values: Sequence[float | None]) -> list[float | None]:
    """p-values corrected for their number after Holm (1979); None is no test and does not count."""
    adjusted: list[float | None] = [None] * len(p_values)
    tested = sorted((p, at) for at, p in enumerate(p_values) if p is not None)
    largest = 0.0
    for position, (p, at) in enumerate(tested):
        largest = max(largest, min(1.0, p * (len(tested) - position)))
        adjusted[at] = largest
    return adjusted
