"""One variant at one rank on one task: what its seeds say together."""

from collections import defaultdict
from collections.abc import Iterable
from dataclasses import dataclass
from statistics import fmean, mean, stdev

from benchmark_suite.report.cells import Broken, Cell


@dataclass(frozen=True)
class Score:
    """Mean over seeds; ``std`` is the sample's (n - 1), so one seed has none."""

    mean: float
    std: float | None
    seeds: tuple[int, ...]


@dataclass(frozen=True)
class Setting:
    """The evaluated cells of one (task, variant, rank), ordered by seed."""

    task: str
    variant: str
    rank: int | None
    cells: tuple[Cell, ...]

    @property
    def score(self) -> Score:
        return self.metric(self.primary)

    @property
    def metrics(self) -> list[str]:
        """What was measured on test examples for every seed, the primary one first."""
        return [name for name in self.cells[0].metrics if all(name in cell.metrics for cell in self.cells)]

    def metric(self, name: str) -> Score:
        """One of ``metrics``."""
        return self._score([cell.metrics[name].value for cell in self.cells])

    @property
    def validation(self) -> Score | None:
        """The primary metric on the validation examples, if every seed has it."""
        if all(cell.primary in cell.validation for cell in self.cells):
            return self._score([cell.validation[cell.primary].value for cell in self.cells])
        return None

    @property
    def primary(self) -> str:
        return self.cells[0].primary

    @property
    def scale(self) -> float:
        return self.cells[0].test.scale

    @property
    def higher_is_better(self) -> bool:
        return self.cells[0].test.higher_is_better

    @property
    def learning_rates(self) -> list[float]:
        return sorted({cell.lr for cell in self.cells if cell.lr is not None})

    def mean(self, name: str) -> float | None:
        """The mean of a cell's number over the seeds that have it."""
        values = [value for cell in self.cells if (value := getattr(cell, name)) is not None]
        return mean(values) if values else None  # of integers an integer, where it is one

    def _score(self, values: list[float]) -> Score:
        seeds = tuple(cell.seed for cell in self.cells)
        return Score(fmean(values), stdev(values) if len(values) > 1 else None, seeds)


def settings(cells: Iterable[Cell]) -> tuple[list[Setting], list[Broken]]:
    """Group evaluated cells by (task, variant, rank); a second cell for the same seed is left out and said so."""
    grouped: dict[tuple[str, str, int | None], dict[int, Cell]] = defaultdict(dict)
    doubles = []
    for cell in cells:
        seeds = grouped[cell.task, cell.variant, cell.rank]
        if cell.seed in seeds:
            reason = f"left out: {cell.task} {cell.variant} r={cell.rank} seed {cell.seed} is also in cell "
            doubles.append(Broken(cell.folder.name, reason + seeds[cell.seed].folder.name))
        else:
            seeds[cell.seed] = cell
    return [
        Setting(*key, tuple(grouped[key][seed] for seed in sorted(grouped[key])))
        for key in sorted(grouped, key=lambda key: (*key[:2], key[2] or 0))
    ], doubles


def best(ranks: list[Setting]) -> Setting:
    """The rank to report: the best on validation, since choosing it on the test examples would flatter it.

    Only where a validation score is missing does the test score decide. The smaller rank wins a tie.
    """
    known = on_validation(ranks)

    def score(at: Setting) -> Score:
        return (at.validation if known else None) or at.score

    sign = -1 if ranks[0].higher_is_better else 1
    return min(ranks, key=lambda at: (sign * score(at).mean, at.rank))


def on_validation(ranks: list[Setting]) -> bool:
    """Whether ``best`` can choose on validation."""
    return all(at.validation for at in ranks)
