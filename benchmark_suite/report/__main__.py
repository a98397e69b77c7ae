"""``python -m benchmark_suite.report RESULTS``."""

import sys

import typer

from benchmark_suite.report.command import report
from nemo_tiedlora.errors import UsageError

app = typer.Typer(add_completion=False, pretty_exceptions_enable=False)
app.command()(report)

if __name__ == "__main__":
    try:
        app(prog_name="python -m benchmark_suite.report")
    except UsageError as error:
        print(f"error: {error}", file=sys.stderr)
        sys.exit(2)
