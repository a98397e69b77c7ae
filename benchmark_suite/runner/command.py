"""The ``run`` and ``sweep`` commands."""

import sys
from enum import StrEnum
from pathlib import Path
from typing import Annotated

import typer

from nemo_tiedlora.facade import AsJson, BaseName, UsageError

DataRoot = Annotated[
    Path | None, typer.Option("--data-root", help="Folder with <dataset>/{train,validation,test}.jsonl.")
]
TasksPath = Annotated[
    list[Path] | None, typer.Option("--tasks-path", help="Folder with tasks of your own (YAML); repeatable.")
]
VariantsPath = Annotated[
    list[Path] | None, typer.Option("--variants-path", help="Folder with variants of your own (YAML); repeatable.")
]
Results = Annotated[Path, typer.Option("--results", help="Folder for results; what is done in it is not done again.")]
Limit = Annotated[int | None, typer.Option(help="Examples of each split, at most.", min=1)]
Steps = Annotated[int | None, typer.Option(help="Optimizer steps, at most, in place of the task's.", min=1)]
Length = Annotated[int | None, typer.Option(help="Tokens of a row, in place of the task's.", min=2)]
Part = Annotated[
    str | None, typer.Option(help="Run the I-th of N parts, as I/N: one process for each, such as a GPU each.")
]
Retry = Annotated[bool, typer.Option("--retry-failed", help="Run failed cells again.")]


Host = Annotated[str, typer.Option(help="What trains: nemo; or hf, Hugging Face's transformers without NeMo.")]
Head = Annotated[
    bool | None,
    typer.Option("--head/--text", help="Train a head, or text; by default a head on encoders. On --host hf."),
]


class Precision(StrEnum):
    """Of the base in memory."""

    full = "32"
    bf16 = "bf16"


Precise = Annotated[Precision, typer.Option(help="Of weights and activations.")]


def run(
    task: Annotated[str, typer.Argument(help="Task id.")],
    variant: Annotated[str, typer.Option(help="Variant name.")] = "TL6",
    rank: Annotated[int | None, typer.Option(help="By default the variant's first.", min=1)] = None,
    seed: Annotated[int, typer.Option(help="Of the run.", min=0)] = 0,
    lr: Annotated[float | None, typer.Option(help="By default the best of the task's, by validation.")] = None,
    base: BaseName = "builtin",
    host: Host = "nemo",
    head: Head = None,
    data_root: DataRoot = None,
    tasks_path: TasksPath = None,
    variants_path: VariantsPath = None,
    limit: Limit = None,
    steps: Steps = None,
    max_seq_length: Length = None,
    precision: Precise = Precision.full,
    results: Results = Path("results"),
    retry_failed: Retry = False,
    as_json: AsJson = False,
) -> None:
    """Train one variant on one task and evaluate it."""
    ranks, rates = ([rank] if rank else None), ([lr] if lr else None)
    _sweep(
        [task], [variant], ranks, [seed], rates, base, host, head, data_root, tasks_path, variants_path, limit, steps,
        max_seq_length, precision, None, results, retry_failed, as_json,
    )  # fmt: skip


def sweep(
    tasks: Annotated[str, typer.Option(help="Tasks or groups, separated by commas.")] = "smoke",
    variants: Annotated[str, typer.Option(help="Variants, separated by commas; or all.")] = "LoRA,TL5,TL6,VeRA",
    ranks: Annotated[str | None, typer.Option(help="Separated by commas; by default each variant's first.")] = None,
    seeds: Annotated[str, typer.Option(help="Separated by commas.")] = "0",
    lrs: Annotated[str | None, typer.Option(help="Learning rates; by default the task's candidates.")] = None,
    base: BaseName = "builtin",
    host: Host = "nemo",
    head: Head = None,
    data_root: DataRoot = None,
    tasks_path: TasksPath = None,
    variants_path: VariantsPath = None,
    limit: Limit = None,
    steps: Steps = None,
    max_seq_length: Length = None,
    precision: Precise = Precision.full,
    part: Part = None,
    results: Results = Path("results"),
    retry_failed: Retry = False,
    as_json: AsJson = False,
) -> None:
    """Cross tasks with variants. Stopped at any moment, the same command goes on where it was."""
    _sweep(
        tasks.split(","), variants.split(","), ranks and _numbers("ranks", ranks, int), _numbers("seeds", seeds, int),
        lrs and _numbers("lrs", lrs, float), base, host, head, data_root, tasks_path, variants_path, limit, steps,
        max_seq_length, precision, part, results, retry_failed, as_json,
    )  # fmt: skip


def _sweep(
    tasks, variants, ranks, seeds, rates, base, host, head, data_root, tasks_path, variants_path, limit, steps,
    max_seq_length, precision, part, results, retry_failed, as_json,
):  # fmt: skip
    from benchmark_suite.runner.guard import survive

    first = survive(results) == 0
    from benchmark_suite import registry
    from benchmark_suite.backends import backend as backend_on
    from benchmark_suite.runner import sweep as sweeping
    from benchmark_suite.runner.runner import Runner
    from nemo_tiedlora.facade import check_output, show, wait_passively

    wait_passively()
    for folder in tasks_path or ():
        registry.register_folder(folder)
    for folder in variants_path or ():
        registry.register_variants(folder)
    backend = backend_on(host, base, str(precision))
    chosen = sweeping.variants_named(variants, backend)
    with_data = sweeping.tasks_named(tasks, data_root, limit, steps=steps, max_seq_length=max_seq_length)
    check_output(results, "results")
    cells = sweeping.matrix(with_data, chosen, backend, ranks, seeds, rates, limit, head)
    if part:
        cells = sweeping.part_of(cells, part)
    with Runner(backend, results, with_data) as runner:
        found = sweeping.sweep(runner, cells, retry_failed and first)
    if as_json:
        show({"results": found}, True)
    else:
        _print(found, results)
    if any(result["status"] == "failed" for result in found):
        sys.exit(1)


def _print(ended: list[dict], results: Path) -> None:
    from rich.console import Console
    from rich.table import Table

    table = Table("task", "variant", "rank", "seed", "lr", "validation", "test", "trainable", "seconds")
    for result in ended:
        name = result["primary"]
        found = [(result.get(split) or {}).get(name) for split in ("validation", "metrics")]
        shown = [f"{name} {each['scale'] * each['value']:.2f}" if each else "" for each in found]
        if result["status"] == "failed":
            shown = ["failed", result["error"]]
        row = [result["task"], result["variant"], result["rank"], result["seed"], f"{result['lr']:g}", *shown]
        table.add_row(*map(str, [*row, result.get("trainable", ""), result.get("seconds", "")]))
    console = Console()
    if not console.is_terminal:
        console.width = 160  # rich takes what is not a terminal to be narrow, and cuts
    console.print(table)
    print(f"{results}: python -m benchmark_suite report {results}")


def _numbers(field: str, given: str, kind: type) -> list:
    try:
        return [kind(number) for number in given.split(",")]
    except ValueError:
        words = "whole numbers" if kind is int else "numbers"
        raise UsageError(field, given, f"write {words} separated by commas") from None
