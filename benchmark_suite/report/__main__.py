"""``python -m benchmark_suite.report RESULTS``."""

import typer

from benchmark_suite.report.command import report
from nemo_tiedlora import console

app = typer.Typer(add_completion=False, pretty_exceptions_enable=False)
app.command()(report)

if __name__ == "__main__":
    console.run(app, "python -m benchmark_suite.report")
