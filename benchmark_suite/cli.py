"""The ``python -m benchmark_suite`` command. Subcommands only read options and print."""

import json
from enum import StrEnum
from pathlib import Path
from typing import Annotated

import typer

from benchmark_suite.report.command import report
from benchmark_suite.runner.command import DataRoot, TasksPath, VariantsPath, run, sweep
from nemo_tiedlora.facade import EPILOG, AsJson, run_command, take_methods

app = typer.Typer(
    name="benchmark_suite",
    help="Fine-tuning methods compared on equal terms.",
    epilog=EPILOG,
    add_completion=False,
    no_args_is_help=True,
    pretty_exceptions_enable=False,
)

app.command()(run)
app.command()(sweep)
app.command()(report)


class Kind(StrEnum):
    """What there is to list."""

    tasks = "tasks"
    variants = "variants"


def main() -> None:
    """Entry point."""
    run_command(app, take=take_methods)


@app.command("list")
def list_all(
    kind: Annotated[Kind, typer.Argument(help="tasks or variants.")] = Kind.tasks,
    group: Annotated[str | None, typer.Option(help="Only the tasks of this group.")] = None,
    tasks_path: TasksPath = None,
    variants_path: VariantsPath = None,
    as_json: AsJson = False,
) -> None:
    """Tasks with their primary metric and groups, or variants with their scheme."""
    from benchmark_suite import registry

    _register(tasks_path, variants_path)
    if kind == Kind.tasks:
        specs = [registry.spec(id) for id in registry.list_tasks(group)]
        facts = [each.to_dict() for each in specs]
        lines: list[tuple[str, ...]] = [(o.id, o.primary, ",".join(o.groups), o.description) for o in specs]
    else:
        variants = [registry.variant(name) for name in registry.list_variants()]
        facts = [each.to_dict() for each in variants]
        lines = [(each.name, each.scheme, each.description) for each in variants]
    if as_json:
        print(json.dumps(facts, indent=2, ensure_ascii=False))
        return
    widths = [max(map(len, column)) for column in zip(*lines, strict=True)]
    for line in lines:
        print("  ".join(cell.ljust(width) for cell, width in zip(line, widths, strict=True)).rstrip())


@app.command()
def show(
    id: Annotated[str, typer.Argument(help="A task or a variant.")],
    data_root: DataRoot = None,
    tasks_path: TasksPath = None,
    variants_path: VariantsPath = None,
    as_json: AsJson = False,
) -> None:
    """A task or variant in full; and an example as the model sees it, if the data are at hand."""
    from benchmark_suite import declared, registry

    _register(tasks_path, variants_path)
    if id in registry.list_variants():
        facts = registry.variant(id).to_dict()
    else:
        facts = registry.spec(id).to_dict()
        if data_root or "generated" in facts["source"] or "folder" in facts["source"]:
            from dataclasses import asdict

            facts["example"] = asdict(registry.load_task(id, data_root, limit=1).examples("validation")[0])
    # By way of JSON, so that tuples are lists to YAML too.
    plain = json.dumps(facts, indent=2, ensure_ascii=False)
    print(plain if as_json else declared.text(json.loads(plain)), end="\n" if as_json else "")


def _register(tasks: list[Path] | None, variants: list[Path] | None) -> None:
    from benchmark_suite.registry import register_folder, register_variants

    for folder in tasks or []:
        register_folder(folder)
    for folder in variants or []:
        register_variants(folder)
