"""Every variant against one other, task by task, each at the rank it is reported with."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from statistics import fmean

import numpy

from benchmark_suite.report.predictions import Unpaired, combined, scores, value
from benchmark_suite.report.settings import Setting
from benchmark_suite.report.significance import LEVEL, Bootstrap, bootstrap, holm, permutation, t_test


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

    @property
    def p(self) -> float | None:
        """Of the test over seeds and examples."""
        return self.bootstrap.p if self.bootstrap else None


def compare(reported: Mapping[tuple[str, str], Setting], against: str) -> list[Comparison]:
    """Compare every (task, variant), at the rank that is ``reported``, with ``against`` on that task."""
    found = [
        comparison(setting, reported[task, against])
        for (task, variant), setting in reported.items()
        if variant != against and (task, against) in reported
    ]
    by_examples, by_seeds = holm([one.p for one in found]), holm([one.t_test_p for one in found])
    return [
        replace(one, bootstrap_holm=examples, t_test_holm=seeds)
        for one, examples, seeds in zip(found, by_examples, by_seeds, strict=True)
    ]


def among_best(settings: Sequence[Setting]) -> list[Setting]:
    """The best of a task's settings, and those that cannot be told from it, Holm-corrected for all it is compared with.

    Where two cannot be compared example by example, the better one is better.
    """
    sign = 1 if settings[0].higher_is_better else -1
    best = max(settings, key=lambda at: sign * at.score.mean)
    others = [at for at in settings if at is not best]
    p_values = holm([comparison(at, best).p for at in others])
    as_good = [
        at
        for at, p in zip(others, p_values, strict=True)
        if at.score.mean == best.score.mean or (p is not None and p >= LEVEL)
    ]
    return [best, *as_good]


def comparison(setting: Setting, other: Setting) -> Comparison:
    """One setting less another on the same task."""
    firsts = {cell.seed: cell for cell in setting.cells}
    seconds = {cell.seed: cell for cell in other.cells}
    seeds = tuple(sorted(firsts.keys() & seconds.keys()))
    values = [firsts[seed].test.value for seed in seeds], [seconds[seed].test.value for seed in seeds]
    tested, why_not = None, ""
    try:
        tested = _tested(setting, [scores(cell[seed]) for seed in seeds for cell in (firsts, seconds)])
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
        bootstrap=tested,
        why_not=why_not,
        t_test_p=t_test(*values) if seeds else None,
    )


def _tested(setting: Setting, sides: list[dict[str, numpy.ndarray]]) -> Bootstrap:
    examples = _paired(sides)
    found = bootstrap(examples, partial(_differences, setting, len(sides)))
    if combined(setting.primary):
        return found
    # Of a mean, what each example adds to the difference. Few that differ are too few to resample.
    exact = permutation(_differences(setting, len(sides), examples).mean(1))
    return found if exact is None else replace(found, p=max(found.p, exact))


def _paired(sides: list[dict[str, numpy.ndarray]]) -> numpy.ndarray:
    """One row per example with what it adds on every side; so an example's seeds are not taken for independent."""
    if not sides:
        raise Unpaired("no seed in common")
    examples = sides[0].keys()
    if not examples or any(side.keys() != examples for side in sides):
        raise Unpaired("different test examples")
    return numpy.array([numpy.concatenate([side[at] for side in sides]) for at in examples])


def _differences(setting: Setting, sides: int, sums: numpy.ndarray) -> numpy.ndarray:
    """First side less second, third less fourth and so on: each seed's difference, (corpora, seeds)."""
    values = numpy.stack([value(setting.primary, side) for side in numpy.split(sums, sides, axis=1)], axis=1)
    return setting.scale * (values[:, ::2] - values[:, 1::2])
