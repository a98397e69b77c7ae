"""The results with one base model; scores of different bases, or hosts, are never in one table."""

from collections.abc import Iterator, Mapping, Sequence, Set
from dataclasses import dataclass
from functools import cached_property
from itertools import groupby

from benchmark_suite.report.cells import Broken, Cell
from benchmark_suite.report.comparisons import Comparison, among_best, compare
from benchmark_suite.report.settings import Setting, best, settings


@dataclass(frozen=True)
class Section:
    """The evaluated cells of one base.

    Args:
        against: the variant that the others are compared with.
    """

    base: str
    base_sha256: str
    cells: Sequence[Cell]
    against: str

    @cached_property
    def _grouped(self) -> tuple[list[Setting], list[Broken]]:
        return settings(self.cells)

    @property
    def settings(self) -> list[Setting]:
        return self._grouped[0]

    @property
    def left_out(self) -> list[Broken]:
        """Cells that repeat another one."""
        return self._grouped[1]

    @cached_property
    def tasks(self) -> list[str]:
        return sorted({at.task for at in self.settings})

    @cached_property
    def variants(self) -> list[str]:
        """The one compared with first, as in the papers' tables."""
        return sorted({at.variant for at in self.settings}, key=lambda name: (name != self.against, name))

    @cached_property
    def reported(self) -> dict[tuple[str, str], Setting]:
        """Every (task, variant) at its best rank."""
        return {key: best(list(ranks)) for key, ranks in groupby(self.settings, key=lambda at: (at.task, at.variant))}

    @cached_property
    def comparisons(self) -> list[Comparison]:
        return compare(self.reported, self.against)

    def among_best(self, chosen: Mapping[tuple[str, str], Setting]) -> set[tuple[str, str]]:
        """Of settings by (task, variant) those that are best on their task, or cannot be told from the best."""
        found = set()
        for task in self.tasks:
            settings = [at for (of, _), at in chosen.items() if of == task]
            if len(settings) > 1:
                found |= {(task, at.variant) for at in among_best(settings)}
        return found

    def ranks(self, task: str, variant: str) -> list[Setting]:
        return [at for at in self.settings if (at.task, at.variant) == (task, variant)]

    def percent(self, setting: Setting) -> float | None:
        """Its trainable parameters in percent of those of the best ``against`` on its task, the papers' P%."""
        other = self.reported.get((setting.task, self.against))
        mine, theirs = setting.mean("trainable"), other.mean("trainable") if other else None
        return 100 * mine / theirs if mine and theirs else None

    @cached_property
    def warnings(self) -> list[str]:
        """What makes scores in one table not comparable."""
        return list(self._warnings())

    def _warnings(self) -> Iterator[str]:
        for task in self.tasks:
            cells = [cell for at in self.settings if at.task == task for cell in at.cells]
            found: Mapping[str, Set[object]] = {
                "different data": {cell.data_sha256 for cell in cells},
                "different metrics": {cell.primary for cell in cells},
                "different numbers of test examples": {cell.test.count for cell in cells},
                "different seeds": {at.score.seeds for at in self.settings if at.task == task},
            }
            for what, values in found.items():
                if len(values) > 1:
                    yield f"{task}: its cells have {what} ({'; '.join(sorted(map(_short, values)))})"


def _short(value: object) -> str:
    if isinstance(value, tuple):
        return ", ".join(map(str, value))
    return str(value)[:12]


def sections(cells: Sequence[Cell], against: str) -> list[Section]:
    """Split evaluated cells by base and its precision, by host, and by whether they trained a head."""
    hosts, heads = {cell.host or "nemo" for cell in cells}, {cell.head for cell in cells}

    def base(cell: Cell) -> tuple[str, str]:
        name = cell.base or ""
        name += f" in {cell.precision}" if cell.precision not in (None, "32") else ""
        name += f" on {cell.host or 'nemo'}" if len(hosts) > 1 else ""
        name += (", heads" if cell.head else ", text") if len(heads) > 1 else ""
        return name, cell.base_sha256 or ""

    return [Section(*key, list(group), against) for key, group in groupby(sorted(cells, key=base), key=base)]
