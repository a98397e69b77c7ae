"""Options that several commands take."""

from typing import Annotated

import typer

from nemo_tiedlora.console import BASES

BaseName = Annotated[str, typer.Option(help=f"Base model: {BASES}, or smollm2, or builtin.")]
AsJson = Annotated[bool, typer.Option("--json", help="Print JSON.")]
