"""The Pareto front: variants and ranks for which no other is both smaller and better."""

from collections.abc import Sequence

from benchmark_suite.report.settings import Setting


def front(settings: Sequence[Setting]) -> list[Setting]:
    """The undominated ones of one task, by size; equals of both size and score stay together."""
    sign = -1 if settings and settings[0].higher_is_better else 1
    chosen: list[Setting] = []
    for at in sorted(settings, key=lambda at: (at.mean("trainable"), sign * at.score.mean)):
        if not chosen:
            chosen.append(at)
            continue
        last = chosen[-1]
        better = sign * at.score.mean < sign * last.score.mean
        equal = (at.mean("trainable"), at.score.mean) == (last.mean("trainable"), last.score.mean)
        if better or equal:
            chosen.append(at)
    return chosen
