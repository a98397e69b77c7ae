"""Whether two variants differ by more than chance: over seeds and test examples together, and over seeds alone."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy

RESAMPLES = 10_000
SEED = 0
#: Resamples drawn at once: enough to be fast, few enough to fit in memory for any number of examples.
BLOCK = 500
#: Examples that differ, at most, for which every exchange of the two sides is looked at.
FEW = 16
#: p-values from which on a difference is taken for chance.
LEVEL = 0.05


@dataclass(frozen=True)
class Bootstrap:
    """The difference over ``examples`` and ``seeds``, its 95 % interval and a two-sided p-value.

    With one seed it speaks of these two runs; with more, of the methods.
    """

    difference: float
    low: float
    high: float
    p: float
    examples: int
    seeds: int


def bootstrap(examples: numpy.ndarray, differences: Callable[[numpy.ndarray], numpy.ndarray]) -> Bootstrap:
    """Resample examples 10,000 times with a fixed seed, and add what other seeds would change.

    Few seeds cannot be resampled: three give ten different means, none far from the observed one. So each resample's
    mean over seeds is moved by the standard error of that mean times a draw of Student's t, with one degree of freedom
    less than there are seeds: without noise of examples this is the paired t-test over seeds, without noise of seeds
    the bootstrap over examples. What of the seeds' spread comes from the examples is counted twice, which makes p
    larger rather than smaller.

    p is the share of resamples whose difference strays from the observed one by at least as much as that strays
    from 0, with one added to both counts so that it is never 0.

    Args:
        examples: (examples, numbers): what each adds to the sums that make the scores of all sides.
        differences: (resamples, numbers), such sums → the difference of each seed's two scores, (resamples, seeds).
    """
    # A resample's sums depend only on how often each distinct row was drawn, so drawing those counts is exact and for
    # 0/1 scores takes four numbers in place of one per example.
    rows, counts = numpy.unique(numpy.asarray(examples, dtype=float), axis=0, return_counts=True)
    number = int(counts.sum())
    by_seed = differences((counts @ rows)[None])[0]
    observed, seeds = float(by_seed.mean()), len(by_seed)
    generator = numpy.random.default_rng(SEED)
    draws = (generator.multinomial(number, counts / number, size=BLOCK) for _ in range(RESAMPLES // BLOCK))
    found = numpy.concatenate([differences(draw @ rows).mean(1) for draw in draws])
    if seeds > 1:
        found += by_seed.std(ddof=1) / seeds**0.5 * generator.permutation(_student(seeds - 1))
    # Sums of the same numbers in another order differ by rounding; that must not decide a tie.
    tolerance = 1e-12 * max(1.0, float(numpy.abs(found).max()))
    extreme = int((numpy.abs(found - observed) >= abs(observed) - tolerance).sum())
    low, high = numpy.quantile(found, [0.025, 0.975])
    return Bootstrap(observed, float(low), float(high), (extreme + 1) / (RESAMPLES + 1), number, seeds)


def _student(freedom: int) -> numpy.ndarray:
    """Student's t at evenly spaced probabilities: its tails are too long for 10,000 random draws to be like it."""
    from scipy.stats import t

    return t.ppf((numpy.arange(RESAMPLES) + 0.5) / RESAMPLES, freedom)


def permutation(differences: Sequence[float]) -> float | None:
    """The exact two-sided p of differences of paired examples, each as likely one way as the other.

    For single runs' right and wrong answers it is McNemar's exact test. None where more than ``FEW`` differ: there the
    bootstrap can be trusted.
    """
    values = numpy.asarray(differences, dtype=float)
    values = values[values != 0]
    if len(values) > FEW:
        return None
    sums = numpy.zeros(1)
    for value in values:
        sums = numpy.concatenate([sums + value, sums - value])
    observed = abs(values.sum())
    return float((numpy.abs(sums) >= observed - 1e-9 * max(1.0, observed)).mean())


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
