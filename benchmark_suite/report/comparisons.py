"""Every variant against one other, task by task, each at the rank it is reported with."""

from collections.abc import Mapping
from dataclasses import dataclass, replace
from functools import partial
from statistics import fmean

import numpy

from benchmark_suite.report.predictions import Unpaired, scores, value
from benchmark_suite.report.settings import Setting
from benchmark_suite.report.significance import Bootstrap, bootstrap, holm, t_test


@dataclass(frozen=True)
class Comparison:
    """A variant less the one it is compared with, over the seeds both have.

    ``p`` values are as tested, ``holm`` values corrected for all comparisons with the same base.
    """

    task: str
    metric: str
    variant: str
    rank: int | None
    other_rank: int | None
    seeds: tuple[int, ...]
    difference: float | None
    bootstrap: Bootstrap | None
    why_not: str
    t_test_p: float | None
    bootstrap_holm: float | None = None
    t_test_holm: float | None = None


def compare(reported: Mapping[tuple[str, str], Setting], against: str) -> list[Comparison]:
    """Compare every (task, variant), at the rank that is ``reported``, with ``against`` on that task."""
    pairs = [
        (setting, reported[task, against])
        for (task, variant), setting in reported.items()
        if variant != against and (task, against) in reported
    ]
    found = [_compare(*pair) for pair in pairs]
    by_examples = holm([one.bootstrap.p if one.bootstrap else None for one in found])
    by_seeds = holm([one.t_test_p for one in found])
    return [
        replace(one, bootstrap_holm=examples, t_test_holm=seeds)
        for one, examples, seeds in zip(found, by_examples, by_seeds, strict=True)
    ]


def _compare(setting: Setting, other: Setting) -> Comparison:
    firsts = {cell.seed: cell for cell in setting.cells}
    seconds = {cell.seed: cell for cell in other.cells}
    seeds = tuple(sorted(firsts.keys() & seconds.keys()))
    values = [firsts[seed].test.value for seed in seeds], [seconds[seed].test.value for seed in seeds]
    resampled, why_not = None, ""
    try:
        sides = [scores(cell[seed]) for seed in seeds for cell in (firsts, seconds)]
        resampled = bootstrap(_paired(sides), partial(_difference, setting, len(sides)))
    except Unpaired as error:
        why_not = str(error)
    return Comparison(
        task=setting.task,
        metric=setting.primary,
        variant=setting.variant,
        rank=setting.rank,
        other_rank=other.rank,
        seeds=seeds,
        difference=fmean(values[0]) - fmean(values[1]) if seeds else None,
        bootstrap=resampled,
        why_not=why_not,
        t_test_p=t_test(*values) if seeds else None,
    )


def _paired(sides: list[dict[str, numpy.ndarray]]) -> numpy.ndarray:
    """One row per example with what it adds on every side; so an example's seeds are not taken for independent."""
    if not sides:
        raise Unpaired("no seed in common")
    examples = sides[0].keys()
    if not examples or any(side.keys() != examples for side in sides):
        raise Unpaired("different test examples")
    return numpy.array([numpy.concatenate([side[at] for side in sides]) for at in examples])


def _difference(setting: Setting, sides: int, sums: numpy.ndarray) -> numpy.ndarray:
    """First side less second, third less fourth and so on: the mean over these seeds."""
    values = [value(setting.primary, side) for side in numpy.split(sums, sides, axis=1)]
    return setting.scale * (numpy.mean(values[::2], axis=0) - numpy.mean(values[1::2], axis=0))
