"""The whole report, before anybody has decided how it is shown."""

from collections import defaultdict
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from benchmark_suite.report.cells import Broken, Cell, load
from benchmark_suite.report.section import Section, sections
from benchmark_suite.report.table import Column, Table, words
from benchmark_suite.report.tables import tables
from nemo_tiedlora.facade import check_choice


@dataclass(frozen=True)
class Chapter:
    """What there is to say about one base."""

    section: Section
    tables: list[Table]


@dataclass(frozen=True)
class Summary:
    """Facts about the results, a chapter for each base, and what could not be used."""

    facts: dict[str, str]
    against: str
    chapters: list[Chapter]
    rest: list[Table]


def summarize(results: Path, against: str | None = None) -> Summary:
    """Read a results folder and work out every table.

    Raises:
        UsageError: there are no results, or no cell is of the variant ``against``. Without one, it is LoRA, or the
            first there is.
    """
    found = load(results)
    variants = sorted({cell.variant for cell in found.cells})
    against = against or ("LoRA" if "LoRA" in variants else [*variants, "LoRA"][0])
    if variants:
        check_choice("against", against, variants)
    evaluated = [cell for cell in found.cells if not cell.failed and cell.metrics and cell.selected]
    parts = sections(evaluated, against)
    rest = [_failed(found.cells), _unusable(found.broken, [double for part in parts for double in part.left_out])]
    return Summary(
        facts=_facts(found.cells, evaluated, found.broken),
        against=against,
        chapters=[Chapter(part, tables(part)) for part in parts],
        rest=[table for table in rest if table.rows],
    )


def _facts(cells: Sequence[Cell], evaluated: Sequence[Cell], broken: Sequence[Broken]) -> dict[str, str]:
    failed = sum(cell.failed for cell in cells)
    versions = defaultdict(set)
    for cell in cells:
        for name, version in cell.versions.items():
            versions[name].add(str(version))
    bases = {f"{cell.base or 'not recorded'} (SHA-256 {cell.base_sha256 or 'not recorded'})" for cell in cells}
    seeds = sorted({cell.seed for cell in evaluated})
    return {
        "Base": "; ".join(sorted(bases)),
        "Host": ", ".join(sorted({cell.host for cell in cells if cell.host})),
        "Cells": (
            f"{len(cells)} read, {len(evaluated)} in the tables, "
            f"{len(cells) - len(evaluated) - failed} only tried on validation, {failed} failed"
        ),
        "Unreadable files": str(len(broken)),
        "Seeds": ", ".join(map(str, seeds)),
        "Test predictions": f"{sum(cell.test.count for cell in evaluated):,}",
        "Versions": "; ".join(f"{name} {' / '.join(sorted(found))}" for name, found in sorted(versions.items())),
    }


def _failed(cells: Sequence[Cell]) -> Table:
    rows = [
        {
            "task": cell.task,
            "variant": cell.variant,
            "rank": cell.rank,
            "seed": cell.seed,
            "lr": cell.lr,
            "error": " ".join((cell.error or "no reason recorded").split()),
            "cell": cell.cell,
        }
        for cell in cells
        if cell.failed
    ]
    columns = [
        words("task", "Task"),
        words("variant", "Variant"),
        Column("rank", "r"),
        Column("seed", "Seed"),
        Column("lr", "Learning rate"),
        words("error", "Error"),
        words("cell", "Cell"),
    ]
    return Table("failed", "Failed cells", "In none of the tables above.", columns, rows)


def _unusable(broken: Sequence[Broken], doubles: Sequence[Broken]) -> Table:
    rows = [{"path": one.path, "reason": one.reason} for one in [*broken, *doubles]]
    columns = [words("path", "Result"), words("reason", "Reason")]
    return Table("unusable", "Unusable results", "In none of the tables above.", columns, rows)
