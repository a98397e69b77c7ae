"""Whether two variants differ by more than chance: paired bootstrap over examples, paired t-test over seeds."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy

RESAMPLES = 10_000
SEED = 0
#: Resamples drawn at once: enough to be fast, few enough to fit in memory for any number of examples.
BLOCK = 500


@dataclass(frozen=True)
class Bootstrap:
    """The difference over ``examples``, its 95 % interval and a two-sided p-value."""

    difference: float
    low: float
    high: float
    p: float
    examples: int


def bootstrap(examples: numpy.ndarray, difference: Callable[[numpy.ndarray], numpy.ndarray]) -> Bootstrap:
    """Resample examples 10,000 times with a fixed seed.

    p is the share of resamples whose difference strays from the observed one by at least as much as that strays
    from 0, with one added to both counts so that it is never 0.

    Args:
        examples: (examples, numbers): what each adds to the sums that make the scores of both sides.
        difference: (resamples, numbers), such sums → the difference of the two scores in each resample.
    """
    # A resample's sums depend only on how often each distinct row was drawn, so drawing those counts is exact and for
    # 0/1 scores takes four numbers in place of one per example.
    rows, counts = numpy.unique(numpy.asarray(examples, dtype=float), axis=0, return_counts=True)
    number = int(counts.sum())
    observed = float(difference((counts @ rows)[None])[0])
    generator = numpy.random.default_rng(SEED)
    draws = (generator.multinomial(number, counts / number, size=BLOCK) for _ in range(RESAMPLES // BLOCK))
    found = numpy.concatenate([difference(draw @ rows) for draw in draws])
    # Sums of the same numbers in another order differ by rounding; that must not decide a tie.
    tolerance = 1e-12 * max(1.0, float(numpy.abs(found).max()))
    extreme = int((numpy.abs(found - observed) >= abs(observed) - tolerance).sum())
    low, high = numpy.quantile(found, [0.025, 0.975])
    return Bootstrap(observed, float(low), float(high), (extreme + 1) / (RESAMPLES + 1), number)


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
