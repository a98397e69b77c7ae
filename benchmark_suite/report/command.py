"""The ``report`` command."""

from pathlib import Path
from typing import Annotated

import typer

from nemo_tiedlora.facade import AsJson


def report(
    results: Annotated[Path, typer.Argument(help="Folder of results; every result.json below it is read.")],
    html: Annotated[Path | None, typer.Option(help="Write one self-contained page with tables and plots.")] = None,
    markdown: Annotated[Path | None, typer.Option(help="Write every table as Markdown.")] = None,
    csv: Annotated[Path | None, typer.Option(help="Write every variant at every rank, unrounded, as CSV.")] = None,
    as_json: AsJson = False,
    against: Annotated[
        str | None, typer.Option(help="The variant to compare with; by default LoRA, or the first there is.")
    ] = None,
) -> None:
    """Tables, plots and significance tests of a benchmark's results."""
    from benchmark_suite.report import formats
    from benchmark_suite.report.page import page
    from benchmark_suite.report.summary import summarize
    from nemo_tiedlora.facade import UsageError, write_text

    summary = summarize(results, against)
    for path, render in ((html, page), (markdown, formats.markdown), (csv, formats.as_csv)):
        if path:
            try:
                write_text(path, render(summary))
            except OSError as error:
                raise UsageError("file", str(path), error.strerror or str(error)) from None
    if as_json:
        print(formats.as_json(summary))
    else:
        formats.show(summary)
