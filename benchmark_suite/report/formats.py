"""The report as text: Markdown, CSV, JSON and what a terminal shows."""

import csv
import io
import json
import re
from collections.abc import Iterator
from dataclasses import asdict

from benchmark_suite.report.summary import Summary
from benchmark_suite.report.table import Column, Entry, Table

#: What a terminal has room for; the rest is in the files.
IN_TERMINAL = ("best", "significance", "cost")


def markdown(summary: Summary) -> str:
    """Every table as GitHub shows them."""
    parts = [
        "# Benchmark of adapters",
        "\n".join(f"- {name}: {_plain(of)}" for name, of in summary.facts.items() if of),
    ]
    for chapter in summary.chapters:
        if len(summary.chapters) > 1:
            parts.append(f"## Base {_plain(chapter.section.base)} ({chapter.section.base_sha256[:12]})")
        parts += [f"**Not comparable:** {_plain(warning)}" for warning in chapter.section.warnings]
        parts += map(_markdown, chapter.tables)
    parts += map(_markdown, summary.rest)
    return "\n\n".join(parts) + "\n"


def as_csv(summary: Summary) -> str:
    """Every evaluated variant and rank with all its numbers, unrounded; one row per base, task, variant and rank."""
    written = io.StringIO()
    writer = None
    for base, table in _settings(summary):
        if not writer:
            writer = csv.DictWriter(written, ["base", "base_sha256", *(column.key for column in table.columns)])
            writer.writeheader()
        for row in table.rows:
            writer.writerow(base | {key: _joined(value) for key, value in row.items()})
    return written.getvalue()


def as_json(summary: Summary) -> str:
    """All tables with their raw values."""
    return json.dumps(
        {
            "facts": summary.facts,
            "against": summary.against,
            "bases": [
                {
                    "base": chapter.section.base,
                    "base_sha256": chapter.section.base_sha256,
                    "warnings": chapter.section.warnings,
                    "tables": {table.key: table.rows for table in chapter.tables},
                }
                for chapter in summary.chapters
            ],
            **{table.key: table.rows for table in summary.rest},
        },
        indent=2,
        ensure_ascii=False,
        default=asdict,
    )


def show(summary: Summary) -> None:
    """Print the tables that fit a terminal."""
    from rich.console import Console
    from rich.text import Text

    # As wide as the tables are: rich would fold cells in the middle of words where it takes the output to be narrow.
    console = Console(width=10_000, highlight=False)
    for name, value in summary.facts.items():
        if value:
            console.print(Text(f"{name}: {value}"))
    for chapter in summary.chapters:
        section = chapter.section
        if len(summary.chapters) > 1:
            console.print(Text(f"\nBase {section.base} ({section.base_sha256[:12]})", style="bold"))
        for warning in section.warnings:
            console.print(Text(f"Not comparable: {warning}", style="yellow"))
        for table in chapter.tables:
            if table.key in IN_TERMINAL:
                _print(console, table)
    for table in summary.rest:
        _print(console, table)


def _print(console, table: Table) -> None:
    from rich.table import Table as Grid
    from rich.text import Text

    grid = Grid(title=Text(table.title, style="bold"), title_justify="left", box=None, pad_edge=False)
    columns = [column for column in table.columns if any(table.shown(row, column) for row in table.rows)]
    for column in columns:
        grid.add_column(Text(column.label), justify="right" if column.numeric else "left")
    for row in table.rows:
        grid.add_row(*(Text(table.shown(row, column)) for column in columns))
    console.print()
    console.print(grid)


def _markdown(table: Table) -> str:
    lines = [
        f"## {_plain(table.title)}",
        "",
        _plain(table.note),
        "",
        _line(_plain(f"{column.label} {column.under}") for column in table.columns),
        _line("---:" if column.numeric else "---" for column in table.columns),
        *(_line(_cell(table, row, column) for column in table.columns) for row in table.rows),
    ]
    return "\n".join(lines)


def _cell(table: Table, row, column: Column) -> str:
    shown = _plain(table.shown(row, column))
    if table.is_best(row, column):
        shown = f"**{shown}**"
    detail = table.detail(row, column)
    return f"{shown} ({_plain(detail)})" if detail else shown


def _line(cells) -> str:
    return f"| {' | '.join(cells)} |"


def _plain(text: str) -> str:
    """Text that Markdown shows as it is."""
    return re.sub(r"([\\`*_{}\[\]<>|#~$])", r"\\\1", " ".join(text.split())).replace("&", "&amp;")


def _settings(summary: Summary) -> Iterator[tuple[dict[str, str], Table]]:
    for chapter in summary.chapters:
        for table in chapter.tables:
            if table.key == "settings":
                yield {"base": chapter.section.base, "base_sha256": chapter.section.base_sha256}, table


def _joined(value: object) -> object:
    if isinstance(value, (list, tuple)):
        return " ".join(map(str, value))
    return value.mean if isinstance(value, Entry) else value
