"""A table before anybody has decided where it is shown."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from benchmark_suite.report import numbers


@dataclass(frozen=True)
class Entry:
    """What a table in the shape of the papers' holds for a variant on a task."""

    mean: float
    std: float | None = None
    seeds: tuple[int, ...] = ()
    rank: int | None = None
    percent: float | None = None
    among_best: bool = False

    def __str__(self) -> str:
        spread = "" if self.std is None else f" ± {self.std:.2f}"
        return numbers.score(self.mean) + spread

    @property
    def detail(self) -> str:
        """The rank and the size that the score was reached with."""
        parts = [f"r {self.rank}" if self.rank is not None else "", numbers.percent(self.percent)]
        return " · ".join(part for part in parts if part)


@dataclass(frozen=True)
class Column:
    """A column: the key of its values in a row, its heading, and how a value is written.

    Args:
        under: what the heading says in small print.
    """

    key: str
    label: str
    show: Callable[[Any], str] = numbers.text
    numeric: bool = True
    under: str = ""


def words(key: str, label: str) -> Column:
    """A column of text."""
    return Column(key, label, numeric=False)


@dataclass(frozen=True)
class Table:
    """Rows of raw values, by the columns' keys."""

    key: str
    title: str
    note: str
    columns: Sequence[Column]
    rows: Sequence[Mapping[str, Any]]

    def shown(self, row: Mapping[str, object], column: Column) -> str:
        """A value as text, its detail left out."""
        return column.show(row.get(column.key))

    def detail(self, row: Mapping[str, object], column: Column) -> str:
        """What belongs to a value in small print."""
        value = row.get(column.key)
        return value.detail if isinstance(value, Entry) else ""

    def order(self, row: Mapping[str, object], column: Column) -> Any:
        """What a value is sorted by."""
        value = row.get(column.key)
        return value.mean if isinstance(value, Entry) else value

    def is_best(self, row: Mapping[str, object], column: Column) -> bool:
        """Whether this value is marked as one of the best of its column."""
        value = row.get(column.key)
        return isinstance(value, Entry) and value.among_best
