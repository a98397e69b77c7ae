"""Continue prompts with a base model and a saved adapter.

python examples/megatron_gpt_generate.py --adapter ADAPTER.nemo "What is 2 plus 3?"
"""

import json
import sys
from pathlib import Path
from typing import Annotated

import typer

from nemo_tiedlora import console, own_methods, scripts
from nemo_tiedlora.errors import UsageError
from nemo_tiedlora.options import BaseName
from nemo_tiedlora.platform.threads import wait_passively

app = typer.Typer(add_completion=False, pretty_exceptions_enable=False)


@app.command()
def main(
    prompts: Annotated[list[str] | None, typer.Argument(help="Prompts; none reads --file or standard input.")] = None,
    base: BaseName = "builtin",
    adapter: Annotated[Path | None, typer.Option(help="Adapter (.nemo) to put on the base.")] = None,
    file: Annotated[Path | None, typer.Option(help="A file with one prompt per line.")] = None,
    tokens: Annotated[int, typer.Option(help="New tokens per prompt, at most.", min=1)] = 32,
    temperature: Annotated[float, typer.Option(help="0 is greedy.", min=0.0)] = 0.0,
    top_p: Annotated[float, typer.Option(help="Nucleus sampling.", min=0.0, max=1.0)] = 1.0,
    batch_size: Annotated[int, typer.Option(help="Prompts per forward pass.", min=1)] = 16,
    precision: Annotated[str, typer.Option(help="32, bf16 or 16.")] = "32",
    as_json: Annotated[bool, typer.Option("--json", help="One JSON object per line: prompt and completion.")] = False,
    trust_sha256: Annotated[
        list[str] | None,
        typer.Option(help="Read the file of this SHA-256 as NeMo would, though that runs what is in it; repeatable."),
    ] = None,
    verbose: Annotated[bool, typer.Option(help="Show NeMo's own log.")] = False,
) -> None:
    """Continue each prompt as it stands; write the adapter's prompt template out."""
    wait_passively()
    from nemo_tiedlora.checkpoint.pickles import check_digests, trusting

    with trusting(check_digests(trust_sha256, "trust-sha256")):
        run(prompts or _lines(file), base, adapter, tokens, temperature, top_p, batch_size, precision, as_json, verbose)


def run(texts, base, adapter, tokens, temperature, top_p, batch_size, precision, as_json, verbose):
    from nemo_tiedlora.huggingface.bases import BUILTIN
    from nemo_tiedlora.job.generate import generator
    from nemo_tiedlora.platform.threads import use_one_thread

    if base == BUILTIN:
        use_one_thread()
    with generator(base, adapter, precision, verbose) as loaded:
        completions = loaded.generate(texts, tokens, temperature, top_p, batch_size)
        for text, completion in zip(texts, completions, strict=True):
            line = {"prompt": text, "completion": completion}
            print(json.dumps(line, ensure_ascii=False) if as_json else text + completion, flush=True)


def _lines(file: Path | None) -> list[str]:
    if file is not None and not file.is_file():
        raise UsageError("file", str(file), "no such file")
    if file is None and sys.stdin.isatty():
        raise UsageError("prompts", None, "give prompts as arguments, with --file, or on standard input")
    text = file.read_text(encoding="utf-8") if file else sys.stdin.read()
    lines = [line for line in text.splitlines() if line.strip()]
    if not lines:
        raise UsageError("file" if file else "prompts", str(file or "standard input"), "there is no prompt in it")
    return lines


if __name__ == "__main__":
    console.run(app, scripts.command(), own_methods.take)
