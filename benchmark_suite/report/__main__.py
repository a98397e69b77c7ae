"""``python -m benchmark_suite.report RESULTS``."""

import typer

from benchmark_suite.report.command import report
from nemo_tiedlora.facade import run_command

app = typer.Typer(add_completion=False, pretty_exceptions_enable=False)
app.command()(report)

if __name__ == "__main__":
    run_command(app, "python -m benchmark_suite.report")
