"""The tables of one base model."""

from collections.abc import Iterator, Mapping
from dataclasses import replace
from math import exp, log
from statistics import fmean
from typing import Any

from benchmark_suite.report import numbers
from benchmark_suite.report.section import Section
from benchmark_suite.report.settings import Setting, on_validation
from benchmark_suite.report.significance import FEW, LEVEL, RESAMPLES, SEED
from benchmark_suite.report.table import Column, Entry, Table, words


def tables(section: Section) -> list[Table]:
    """All of them, in the order they are read."""
    found = [scores(section), same_rank(section), reported(section), metrics(section)]
    found += [significance(section), cost(section)]
    return [table for table in [*found, every_setting(section), tasks(section)] if table.rows]


def scores(section: Section) -> Table:
    """Variants by tasks at each variant's best rank: the second half of the Tied-LoRA table, or the GLUE table."""
    note = (
        "Mean ± standard deviation over seeds on the test examples, at each variant's best rank r, chosen on "
        "validation where every rank has a validation score. "
    )
    return _by_task(section, "scores", "Scores at each variant's best rank", note, section.reported)


def same_rank(section: Section) -> Table:
    """The first half of the Tied-LoRA table: everything at the rank that is best for the one compared with."""
    chosen = {}
    for variant in section.variants:
        for task in section.tasks:
            other = section.reported.get((task, section.against))
            for at in section.ranks(task, variant):
                if other and at.rank in (other.rank, None):
                    chosen[task, variant] = at
    note = (
        f"As above, with every variant that has a rank at the rank r that is best for {section.against} on the task. "
    )
    return _by_task(section, "same_rank", f"Scores at {section.against}'s best rank", note, chosen)


def reported(section: Section) -> Table:
    """One row per task and variant, at its best rank."""
    rows = []
    for (task, variant), at in section.reported.items():
        other = section.reported.get((task, section.against))
        rows.append(
            {
                "task": task,
                "variant": variant,
                "metric": at.primary,
                "score": at.score.mean,
                "std": at.score.std,
                "difference": at.score.mean - other.score.mean if other and other is not at else None,
                "rank": at.rank,
                "chosen_on": "validation" if on_validation(section.ranks(task, variant)) else "test",
                "trainable": at.mean("trainable"),
                "percent": section.percent(at),
                "examples": at.cells[0].test.count,
                "seeds": at.score.seeds,
            }
        )
    columns = [
        words("task", "Task"),
        words("variant", "Variant"),
        words("metric", "Metric"),
        Column("score", "Score", numbers.score),
        Column("std", "± std", numbers.score),
        Column("difference", f"Δ {section.against}", numbers.signed),
        Column("rank", "Best r"),
        words("chosen_on", "r chosen on"),
        Column("trainable", "Trainable", numbers.count),
        Column("percent", "P%", numbers.percent),
        Column("examples", "Examples", numbers.count),
        Column("seeds", "Seeds", numbers.listed, numeric=False),
    ]
    note = f"P% is the share of the trainable parameters of the best {section.against} on the task."
    return Table("best", "Best rank, by task and variant", note, columns, rows)


def metrics(section: Section) -> Table:
    """Tasks with several metrics, or several splits to test on."""
    rows: list[dict[str, Any]] = [
        {
            "task": task,
            "metric": name,
            "variant": variant,
            "score": at.metric(name).mean,
            "std": at.metric(name).std,
            "rank": at.rank,
            "examples": at.cells[0].metrics[name].count,
        }
        for (task, variant), at in section.reported.items()
        if len(at.metrics) > 1
        for name in at.metrics
    ]
    columns = [
        words("task", "Task"),
        words("metric", "Metric"),
        words("variant", "Variant"),
        Column("score", "Score", numbers.score),
        Column("std", "± std", numbers.score),
        Column("rank", "Best r"),
        Column("examples", "Examples", numbers.count),
    ]
    rows.sort(key=lambda row: (row["task"], row["metric"], section.variants.index(row["variant"])))
    note = "Each variant at its best rank, which the task's first metric chose."
    return Table("metrics", "Every metric of tasks with several", note, columns, rows)


def significance(section: Section) -> Table:
    """Every variant against one."""
    rows = [
        {
            "task": one.task,
            "variant": one.variant,
            "metric": one.metric,
            "rank": one.rank,
            "other_rank": one.other_rank,
            "difference": one.difference,
            "low": one.bootstrap and one.bootstrap.low,
            "high": one.bootstrap and one.bootstrap.high,
            "bootstrap_p": one.bootstrap and one.bootstrap.p,
            "bootstrap_holm": one.bootstrap_holm,
            "examples": one.bootstrap and one.bootstrap.examples,
            "t_test_p": one.t_test_p,
            "t_test_holm": one.t_test_holm,
            "seeds": one.seeds,
            "speaks_of": "the methods" if len(one.seeds) > 1 else "these two runs",
            "why_not": one.why_not,
        }
        for one in section.comparisons
    ]
    columns = [
        words("task", "Task"),
        words("variant", "Variant"),
        words("metric", "Metric"),
        Column("rank", "r"),
        Column("other_rank", f"r of {section.against}"),
        Column("difference", "Difference", numbers.signed),
        Column("low", "95 % from", numbers.signed),
        Column("high", "to", numbers.signed),
        Column("bootstrap_p", "p", numbers.p_value),
        Column("bootstrap_holm", "Holm", numbers.p_value),
        Column("examples", "Examples", numbers.count),
        Column("t_test_p", "p t-test", numbers.p_value),
        Column("t_test_holm", "Holm (t)", numbers.p_value),
        Column("seeds", "Seeds", numbers.listed, numeric=False),
        words("speaks_of", "Speaks of"),
        words("why_not", "No p because"),
    ]
    tested = [sum(row[name] is not None for row in rows) for name in ("bootstrap_p", "t_test_p")]
    note = (
        f"Each variant at its best rank less {section.against} at its own, over the seeds both have. p is of a paired "
        f"bootstrap over test examples ({RESAMPLES:,} resamples, generator seed {SEED}) in which the mean over seeds "
        "strays as Student's t says of that many seeds; where no more than "
        f"{FEW} examples differ, it is at least that of exchanging them all ways. p t-test is paired, over seeds "
        f"alone. All are two-sided, each Holm-corrected for its tests here ({tested[0]} and {tested[1]}). What one "
        "seed shows is a difference between two runs, which another seed may turn around."
    )
    if not all(on_validation(section.ranks(*key)) for key in section.reported):
        note += " Where the best rank was chosen on the test examples, p-values are too small."
    return Table("significance", f"Differences from {section.against}", note, columns, rows)


def cost(section: Section) -> Table:
    """What a variant costs beside the one compared with."""
    names = ("trainable", "adapter_bytes", "peak_memory_bytes", "tokens_per_second", "seconds")
    rows = []
    for variant in section.variants:
        pairs = list(_pairs(section, variant))
        if pairs:
            row = {"variant": variant, "pairs": len(pairs), **{name: _ratio(pairs, name) for name in names}}
            for name in ("peak_memory_bytes", "tokens_per_second"):
                known = [value for at, _ in pairs if (value := at.mean(name)) is not None]
                row[f"mean_{name}"] = fmean(known) if known else None
            rows.append(row)
    columns = [
        words("variant", "Variant"),
        Column("pairs", "Pairs", numbers.count),
        Column("trainable", "Trainable", numbers.times),
        Column("adapter_bytes", "Adapter file", numbers.times),
        Column("peak_memory_bytes", "Peak memory", numbers.times),
        Column("mean_peak_memory_bytes", "Mean peak memory", numbers.size),
        Column("tokens_per_second", "Speed", numbers.times),
        Column("mean_tokens_per_second", "Mean tokens/s", numbers.count),
        Column("seconds", "Run time", numbers.times),
    ]
    note = (
        f"Relative to {section.against} at the same task and rank (its best where a variant has none): the geometric "
        "mean over the pairs both have. Means are over the same pairs."
    )
    return Table("cost", f"Cost beside {section.against}", note, columns, rows)


def every_setting(section: Section) -> Table:
    """All there is, one row per task, variant and rank."""
    rows = [
        {
            "task": at.task,
            "variant": at.variant,
            "rank": at.rank,
            "best": "best" if section.reported[at.task, at.variant] is at else "",
            "metric": at.primary,
            "score": at.score.mean,
            "std": at.score.std,
            "validation": at.validation and at.validation.mean,
            "seeds": at.score.seeds,
            "examples": at.cells[0].test.count,
            "learning_rates": at.learning_rates,
            **{
                name: at.mean(name)
                for name in (
                    "trainable",
                    "stored",
                    "percent_of_lora",
                    "adapter_bytes",
                    "peak_memory_bytes",
                    "tokens_per_second",
                    "seconds",
                    "steps",
                )
            },
        }
        for at in section.settings
    ]
    columns = [
        words("task", "Task"),
        words("variant", "Variant"),
        Column("rank", "r"),
        words("best", "Best r"),
        words("metric", "Metric"),
        Column("score", "Score", numbers.score),
        Column("std", "± std", numbers.score),
        Column("validation", "Validation", numbers.score),
        Column("seeds", "Seeds", numbers.listed, numeric=False),
        Column("examples", "Examples", numbers.count),
        Column("learning_rates", "Learning rates", numbers.listed, numeric=False),
        Column("trainable", "Trainable", numbers.count),
        Column("stored", "Stored", numbers.count),
        Column("percent_of_lora", "% of LoRA, same r", numbers.percent),
        Column("adapter_bytes", "Adapter file", numbers.size),
        Column("peak_memory_bytes", "Peak memory", numbers.size),
        Column("tokens_per_second", "Tokens/s", numbers.count),
        Column("seconds", "Time", numbers.seconds),
        Column("steps", "Steps", numbers.count),
    ]
    note = "Means over seeds. Where several learning rates won on validation, one per seed, all are named."
    return Table("settings", "Every variant at every rank", note, columns, rows)


def tasks(section: Section) -> Table:
    """What was measured, on which data."""
    rows = []
    for task in section.tasks:
        cells = [cell for at in section.settings if at.task == task for cell in at.cells]
        rows.append(
            {
                "task": task,
                "metric": " / ".join(sorted({cell.primary for cell in cells})),
                "examples": " / ".join(str(count) for count in sorted({cell.test.count for cell in cells})),
                "variants": len({cell.variant for cell in cells}),
                "ranks": sorted({cell.rank for cell in cells if cell.rank is not None}),
                "seeds": sorted({cell.seed for cell in cells}),
                "cells": len(cells),
                "data_sha256": " / ".join(sorted({cell.data_sha256 or "not recorded" for cell in cells})),
            }
        )
    columns = [
        words("task", "Task"),
        words("metric", "Metric"),
        Column("examples", "Test examples"),
        Column("variants", "Variants", numbers.count),
        Column("ranks", "Ranks", numbers.listed, numeric=False),
        Column("seeds", "Seeds", numbers.listed, numeric=False),
        Column("cells", "Cells", numbers.count),
        words("data_sha256", "SHA-256 of the data"),
    ]
    return Table("tasks", "Tasks and data", "What the scores above were measured on.", columns, rows)


def _by_task(section: Section, key: str, title: str, note: str, chosen: Mapping[tuple[str, str], Setting]) -> Table:
    """A table of entries, with their average for the variants that have them all."""
    best = section.among_best(chosen)
    rows: list[dict[str, Any]] = []
    for variant in section.variants:
        found = {
            task: replace(_entry(section, chosen[task, variant]), among_best=(task, variant) in best)
            for task in section.tasks
            if (task, variant) in chosen
        }
        if found:
            rows.append({"variant": variant, **found})
    comparable = [task for task in section.tasks if _higher_is_better(section, task)]
    for row in rows:
        entries = [row[task] for task in comparable if task in row]
        if len(entries) == len(comparable) > 1:
            percents = [entry.percent for entry in entries if entry.percent is not None]
            row["average"] = Entry(
                fmean(entry.mean for entry in entries), percent=fmean(percents) if percents else None
            )
    columns = [
        words("variant", "Variant"),
        *(Column(task, task, under=_metric(section, task)) for task in section.tasks),
    ]
    if best:
        note += (
            f"Marked are the best of a task and what cannot be told from it (p ≥ {LEVEL:g} as under differences, Holm-"
            "corrected for all it is compared with here). "
        )
    if len(comparable) > 1:
        columns.append(Column("average", "Average", under=f"of {len(comparable)} tasks"))
        note += "The average is given where no task is missing"
        note += "." if comparable == section.tasks else " and leaves out tasks where lower is better."
    note += f" P% is the share of the trainable parameters of the best {section.against} on the task."
    return Table(key, title, " ".join(note.split()), columns, rows)


def _entry(section: Section, at: Setting) -> Entry:
    return Entry(at.score.mean, at.score.std, at.score.seeds, at.rank, section.percent(at))


def _higher_is_better(section: Section, task: str) -> bool:
    return next(at for at in section.settings if at.task == task).higher_is_better


def _metric(section: Section, task: str) -> str:
    return next(at for at in section.settings if at.task == task).primary


def _pairs(section: Section, variant: str) -> Iterator[tuple[Setting, Setting]]:
    others = {(at.task, at.rank): at for at in section.settings if at.variant == section.against}
    for at in section.settings:
        if at.variant == variant:
            same_rank = others.get((at.task, at.rank))
            best = section.reported.get((at.task, section.against))
            other = same_rank or (best if best and None in (at.rank, best.rank) else None)
            if other:
                yield at, other


def _ratio(pairs: list[tuple[Setting, Setting]], name: str) -> float | None:
    """Geometric, so that it does not matter which of the two is above the line."""
    both = [(at.mean(name), other.mean(name)) for at, other in pairs]
    logs = [log(mine / theirs) for mine, theirs in both if mine and theirs]
    return exp(fmean(logs)) if logs else None
