"""A matrix of cells: trained, the best learning rate of each chosen by validation, and that one tested."""

from collections.abc import Iterable, Sequence
from dataclasses import replace
from pathlib import Path

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

from benchmark_suite import registry
from benchmark_suite.backends import Backend
from benchmark_suite.runner.cell import Cell, sha256_of_examples
from benchmark_suite.runner.runner import Runner
from benchmark_suite.task import Task
from benchmark_suite.variant_spec import VariantSpec
from nemo_tiedlora.facade import UsageError


def matrix(
    tasks: dict[str, Task],
    variants: Sequence[VariantSpec],
    backend: Backend,
    ranks: Sequence[int] | None,
    seeds: Sequence[int],
    rates: Sequence[float] | None,
    limit: int | None,
    head: bool | None = None,
) -> list[Cell]:
    """Every cell, tasks first.

    Args:
        ranks: None takes each variant's first. rates: None takes the task's candidates for the variant.
        head: whether to train heads, and not text; None: as the base is made for.

    Raises:
        UsageError: the base does not do a task, or a variant does not fit it.
    """
    own_ranks = {each.name: (ranks or each.ranks[:1]) if each.rank_setting else [None] for each in variants}
    base_sha256 = backend.base_sha256
    heads = {id: backend.has_head(task.spec, head) for id, task in tasks.items()}
    for variant in variants:
        for rank in own_ranks[variant.name]:
            for with_head in sorted(set(heads.values())):
                backend.check(variant, rank, with_head)
    cells = []
    for id, task in tasks.items():
        data_sha256 = sha256_of_examples(task, heads[id])
        for variant in variants:
            candidates = rates or task.spec.recipe.rates(variant)
            for rank in own_ranks[variant.name]:
                for seed in seeds:
                    cells += [
                        Cell(
                            task.spec, variant, rank, seed, rate, base_sha256, data_sha256, backend.precision,
                            limit, backend.host, heads[id],
                        )
                        for rate in candidates
                    ]  # fmt: skip
    return cells


def tasks_named(names: Iterable[str], data_root: Path | None, limit: int | None, **recipe) -> dict[str, Task]:
    """Tasks by id or group, with their data read and checked, all but the test split.

    Args:
        recipe: fields of the training recipe to replace, where not None.
    """
    ids: list[str] = []
    for name in names:
        ids += registry.list_tasks(name) if name in registry.list_groups() else [name]
    changed = {field: value for field, value in recipe.items() if value is not None}
    tasks = {}
    for id in dict.fromkeys(ids):
        task = registry.load_task(id, data_root=data_root, limit=limit)
        if changed:
            task.spec = replace(task.spec, recipe=replace(task.spec.recipe, **changed))
        task.check()
        tasks[id] = task
    return tasks


def variants_named(names: Iterable[str], backend: Backend) -> list[VariantSpec]:
    """Variants by name; ``all`` is every one that the backend runs. Their settings are checked."""
    found: dict[str, VariantSpec] = {}
    for name in names:
        every = [each for each in registry.list_variants() if name == "all" and backend.runs(registry.variant(each))]
        for each in every or [name]:
            variant = registry.variant(each)
            variant.check()
            found[variant.name] = variant
    if not found:
        raise UsageError("variants", [], "name at least one")
    return list(found.values())


def sweep(runner: Runner, cells: Sequence[Cell], retry_failed: bool = False, show: bool = True) -> list[dict]:
    """Bring every cell to its end, and return the results.

    Cells that are done are left alone, so a sweep that was stopped goes on where it was. A failed cell stops no other.

    Args:
        retry_failed: run failed cells again.
        show: a progress display on standard error.
    """
    columns = TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn()
    console = Console(stderr=True)
    with Progress(*columns, console=console, disable=not (show and console.is_terminal)) as progress:
        overall = progress.add_task("", total=len(cells))
        current = progress.add_task("", total=None)
        counts = {"done": 0, "failed": 0}
        results = {}

        def tell(cell: Cell | None) -> None:
            running = f"{cell.task.id} {cell.variant.name} {cell.name}" if cell else ""
            progress.update(overall, description=f"done {counts['done']}, failed {counts['failed']}", advance=0)
            progress.update(current, description=running, completed=0)

        for contest in _contests(cells):
            for cell in contest:
                if retry_failed and runner.state(cell) == "failed":
                    runner.forget(cell)
                tell(cell)
                if runner.state(cell) == "new":
                    runner.train(cell, lambda step, steps: progress.update(current, completed=step, total=steps))
            trained = [cell for cell in contest if runner.state(cell) == "trained"]
            if trained:
                best = _best(runner, trained)
                for cell in trained:
                    tell(cell)
                    runner.test(cell) if cell is best else runner.lost(cell)
            for cell in contest:
                results[cell.hash] = runner.result(cell)
                counts[results[cell.hash]["status"]] += 1
                progress.update(overall, advance=1)
            tell(None)
    return [results[cell.hash] for cell in cells]


def part_of(cells: Sequence[Cell], part: str) -> list[Cell]:
    """The share of one of several processes that run a sweep together: ``2/4`` is the second of four.

    Cells that differ in the learning rate only stay together.

    Raises:
        UsageError: not of this form.
    """
    number, slash, parts = part.partition("/")
    if not (slash and number.isdecimal() and parts.isdecimal() and 1 <= int(number) <= int(parts)):
        raise UsageError("part", part, "write which part of how many, such as 1/4")
    return [cell for contest in _contests(cells)[int(number) - 1 :: int(parts)] for cell in contest]


def _contests(cells: Sequence[Cell]) -> list[list[Cell]]:
    """Cells that differ in the learning rate only, together."""
    contests: dict[str, list[Cell]] = {}
    for cell in cells:
        contests.setdefault(cell.contest.hash, []).append(cell)
    return list(contests.values())


def _best(runner: Runner, cells: Sequence[Cell]) -> Cell:
    """The best on the validation split; of equals, the first."""

    def score(cell: Cell) -> float:
        result = runner.result(cell)
        return result["validation"][result["primary"]]["value"]

    return max(cells, key=score)
