"""The report as one HTML page that needs nothing else: no network, no other file."""

from pathlib import Path

from benchmark_suite.report.drawing import COLOURS
from benchmark_suite.report.plots import MARKERS, galleries
from benchmark_suite.report.summary import Summary

#: The markers of the plots as characters, for the legend.
SIGNS = dict(zip(MARKERS, "●■◆▲▼✚★✖⬟◀▶⬢♦", strict=True))


def page(summary: Summary) -> str:
    """The page; everything that comes from a file is escaped."""
    from jinja2 import Environment, FileSystemLoader, StrictUndefined

    loader = FileSystemLoader(Path(__file__).with_name("templates"))
    environment = Environment(
        loader=loader, autoescape=True, undefined=StrictUndefined, trim_blocks=True, lstrip_blocks=True
    )
    chapters = [
        {
            "section": chapter.section,
            "tables": chapter.tables,
            "galleries": galleries(
                chapter.section, next((table for table in chapter.tables if table.key == "cost"), None)
            ),
            "legend": [
                {"name": name, "colour": place % COLOURS, "sign": SIGNS[MARKERS[place % len(MARKERS)]]}
                for place, name in enumerate(chapter.section.variants)
            ],
        }
        for chapter in summary.chapters
    ]
    return environment.get_template("page.html").render(summary=summary, chapters=chapters)
