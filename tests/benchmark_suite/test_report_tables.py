"""The numbers of the tables against ones worked out by hand."""

import pytest
from report_results import metric, write

from benchmark_suite.report import numbers
from benchmark_suite.report.page import page
from benchmark_suite.report.summary import summarize


def cell(folder, variant, rank, test, seed=0, task="gsm8k-v1", validation=None, higher=True, **fields):
    """A cell with the scores ``test`` and ``validation``."""
    fields |= {"metrics": {"exact_match": metric(test, higher_is_better=higher)}}
    if validation is not None:
        fields["validation"] = {"exact_match": metric(validation, 32, higher)}
    write(folder / f"{task}-{variant}-{rank}-{seed}", variant=variant, rank=rank, seed=seed, task=task, **fields)


def tables(folder, against="LoRA"):
    (chapter,) = summarize(folder, against).chapters
    return {table.key: table for table in chapter.tables}


def rows(table, *keys):
    return {tuple(row[key] for key in keys): row for row in table.rows}


@pytest.fixture
def two_tasks(tmp_path):
    """LoRA and TL6 at two ranks with two seeds, on two tasks."""
    for task, plus in (("gsm8k-v1", 0), ("squad-v1", 50)):
        for seed in (0, 1):
            more = {"task": task, "seed": seed}
            cell(tmp_path, "LoRA", 2, 20 + plus + seed, validation=10, trainable=400, **more)
            cell(tmp_path, "LoRA", 8, 30 + plus + 2 * seed, validation=20, trainable=1600, **more)
            cell(tmp_path, "TL6", 2, 29 + plus + seed, validation=30, trainable=100, peak_memory_bytes=2**29, **more)
            # The better test score at the rank that validation does not choose must not be reported.
            cell(tmp_path, "TL6", 8, 40 + plus + seed, validation=25, trainable=200, peak_memory_bytes=2**28, **more)
    return tmp_path


def test_scores_at_the_best_rank(two_tasks):
    table = tables(two_tasks)["scores"]
    found = rows(table, "variant")
    lora, tl6 = found["LoRA",], found["TL6",]
    assert [row["variant"] for row in table.rows] == ["LoRA", "TL6"]
    assert str(lora["gsm8k-v1"]) == "31.00 ± 1.41" and lora["gsm8k-v1"].detail == "r 8 · 100.0 %"
    assert str(tl6["gsm8k-v1"]) == "29.50 ± 0.71" and tl6["gsm8k-v1"].detail == "r 2 · 6.2 %"
    assert tl6["gsm8k-v1"].percent == 6.25 and tl6["gsm8k-v1"].seeds == (0, 1)
    assert lora["average"].mean == (31 + 81) / 2 and tl6["average"].mean == (29.5 + 79.5) / 2
    column = next(column for column in table.columns if column.key == "gsm8k-v1")
    assert table.is_best(lora, column) and not table.is_best(tl6, column)


def test_scores_at_the_rank_of_lora(two_tasks):
    found = rows(tables(two_tasks)["same_rank"], "variant")
    assert str(found["TL6",]["squad-v1"]) == "90.50 ± 0.71" and found["TL6",]["squad-v1"].detail == "r 8 · 12.5 %"


def test_best_rank_by_task_and_variant(two_tasks):
    row = rows(tables(two_tasks)["best"], "task", "variant")["squad-v1", "TL6"]
    assert (row["score"], row["rank"], row["trainable"], row["percent"]) == (79.5, 2, 100, 6.25)
    assert (row["difference"], row["chosen_on"], row["examples"], row["seeds"]) == (-1.5, "validation", 64, (0, 1))


def test_cost_is_the_geometric_mean_over_pairs(two_tasks):
    row = rows(tables(two_tasks)["cost"], "variant")["TL6",]
    assert row["pairs"] == 4 and row["peak_memory_bytes"] == pytest.approx((1 / 2 * 1 / 4) ** 0.5)
    assert row["trainable"] == pytest.approx((100 / 400 * 200 / 1600) ** 0.5)
    assert row["mean_peak_memory_bytes"] == (2**29 + 2**28) / 2


def test_every_setting(two_tasks):
    table = tables(two_tasks)["settings"]
    row = rows(table, "task", "variant", "rank")["gsm8k-v1", "LoRA", 8]
    assert len(table.rows) == 8 and row["best"] == "best" and row["validation"] == 20 and row["steps"] == 100


def test_without_validation_the_test_score_chooses_and_says_so(tmp_path):
    for rank, test in ((2, 10), (8, 12), (32, 12)):
        cell(tmp_path, "LoRA", rank, test)
    found = tables(tmp_path)
    (row,) = found["best"].rows
    assert (row["rank"], row["chosen_on"], row["std"]) == (8, "test", None) and "significance" not in found


def test_marked_is_what_cannot_be_told_from_the_best(tmp_path):
    """Two that differ by one answer of forty, a third that is far off, and one that nothing can be said of."""
    right = {"LoRA": 30, "TL5": 31, "TL6": 4, "VeRA": 30}
    for variant, number in right.items():
        folder = write(tmp_path / variant, [1] * number + [0] * (40 - number), variant=variant)
        if variant == "VeRA":
            (folder / "predictions.jsonl").unlink()
    write(tmp_path / "alone", [1], task="squad-v1")
    table = tables(tmp_path)["scores"]
    column = next(column for column in table.columns if column.key == "gsm8k-v1")
    marked = {row["variant"] for row in table.rows if table.is_best(row, column)}
    assert marked == {"LoRA", "TL5"}
    alone = next(column for column in table.columns if column.key == "squad-v1")
    assert not any(table.is_best(row, alone) for row in table.rows), "the only one there is best of nothing"


def test_a_difference_of_single_runs_is_called_one(tmp_path):
    for variant, seeds in (("LoRA", (0, 1)), ("TL5", (0, 1)), ("TL6", (1,))):
        for seed in seeds:
            write(tmp_path / f"{variant}{seed}", [1, 0, 1, seed], variant=variant, seed=seed)
    found = rows(tables(tmp_path)["significance"], "variant")
    assert found["TL5",]["speaks_of"] == "the methods" and found["TL6",]["speaks_of"] == "these two runs"


def test_lower_is_better(tmp_path):
    for variant, rank, test in (("LoRA", 2, 9), ("LoRA", 8, 7), ("TL6", 2, 6), ("TL6", 8, 8)):
        cell(tmp_path, variant, rank, test, higher=False, task="perplexity-v1")
    cell(tmp_path, "LoRA", 8, 50)
    table = tables(tmp_path)["scores"]
    found = rows(table, "variant")
    assert found["LoRA",]["perplexity-v1"].rank == 8 and found["TL6",]["perplexity-v1"].rank == 2
    column = next(column for column in table.columns if column.key == "perplexity-v1")
    assert table.is_best(found["TL6",], column) and "average" not in found["TL6",]


def test_a_variant_without_a_rank_is_in_every_table(tmp_path):
    for rank, test, trainable in ((2, 20, 400), (8, 30, 1600)):
        cell(tmp_path, "LoRA", rank, test, validation=test, trainable=trainable)
    cell(tmp_path, "full", None, 40, validation=40, trainable=16_000)
    found = tables(tmp_path)
    for key in ("scores", "same_rank"):
        entry = rows(found[key], "variant")["full",]["gsm8k-v1"]
        assert (entry.mean, entry.rank, entry.detail) == (40, None, "1000.0 %")
    assert rows(found["cost"], "variant")["full",]["trainable"] == pytest.approx(10)  # beside LoRA at its best rank
    assert rows(found["significance"], "variant")["full",]["difference"] == 10
    assert rows(found["settings"], "variant", "rank")["full", None]["score"] == 40
    assert found["tasks"].rows[0]["ranks"] == [2, 8]
    drawn = page(summarize(tmp_path, "LoRA"))
    assert drawn.count("<svg") >= 4 and "full" in drawn
    rows(tables(tmp_path, against="full")["cost"], "variant")["LoRA",]  # each of its ranks beside it


def test_every_metric_of_a_task_is_reported_in_its_own_scale(tmp_path):
    for seed, f1 in ((0, 0.5), (1, 0.6)):
        both = {"exact_match": metric(0.25) | {"scale": 100.0}, "f1": metric(f1) | {"scale": 100.0}}
        write(tmp_path / str(seed), seed=seed, metrics=both)
    found = tables(tmp_path)
    row = rows(found["metrics"], "task", "metric", "variant")["gsm8k-v1", "f1", "LoRA"]
    assert (row["score"], row["std"]) == (pytest.approx(55), pytest.approx(50**0.5))
    assert found["best"].rows[0]["score"] == 25


def test_no_average_where_a_task_is_missing(tmp_path):
    for task in ("gsm8k-v1", "squad-v1"):
        cell(tmp_path, "LoRA", 8, 50, task=task)
    cell(tmp_path, "TL6", 8, 90)
    found = rows(tables(tmp_path)["scores"], "variant")
    assert found["LoRA",]["average"].mean == 50 and "average" not in found["TL6",]


def test_what_stays_out_of_the_scores(tmp_path):
    cell(tmp_path, "LoRA", 8, 50)
    cell(tmp_path, "LoRA", 8, 99, seed=1, selected=False)
    write(tmp_path / "validation-only", variant="LoRA", seed=2, status="trained")
    write(tmp_path / "failed", status="failed", error="out of\nmemory", variant="TL6")
    write(tmp_path / "again", variant="LoRA", metrics={"exact_match": metric(1.0)})
    (tmp_path / "broken").mkdir()
    (tmp_path / "broken" / "result.json").write_text("{")
    summary = summarize(tmp_path, "LoRA")
    assert summary.facts["Cells"] == "5 read, 2 in the tables, 2 only tried on validation, 1 failed"
    assert summary.facts["Unreadable files"] == "1" and summary.facts["Versions"] == "torch 2.13.0"
    failed, unusable = summary.rest
    assert failed.rows[0]["error"] == "out of memory"
    assert [row["path"] for row in unusable.rows] == ["broken/result.json", "gsm8k-v1-LoRA-8-0"]
    (row,) = summary.chapters[0].tables[0].rows
    assert row["gsm8k-v1"].seeds == (0,)


def test_bases_are_kept_apart_and_differences_named(tmp_path):
    cell(tmp_path, "LoRA", 8, 50, base="a.nemo", base_sha256="a" * 64)
    cell(tmp_path, "LoRA", 2, 60, data_sha256="e" * 64)
    cell(tmp_path, "TL6", 2, 60, seed=4)
    one, two = summarize(tmp_path, "LoRA").chapters
    assert (one.section.base, two.section.base) == ("a.nemo", "tiny.nemo")
    assert one.section.warnings == [] and two.section.warnings == [
        "gsm8k-v1: its cells have different data (dddddddddddd; eeeeeeeeeeee)",
        "gsm8k-v1: its cells have different seeds (0; 4)",
    ]


def test_precisions_are_kept_apart(tmp_path):
    cell(tmp_path, "LoRA", 8, 50, precision="32")
    cell(tmp_path, "LoRA", 2, 60, precision="bf16")
    one, two = summarize(tmp_path, "LoRA").chapters
    assert (one.section.base, two.section.base) == ("tiny.nemo", "tiny.nemo in bf16")


def test_numbers():
    assert [numbers.size(value) for value in (None, 512, 2048, 3 * 2**30)] == ["", "512 B", "2.0 KiB", "3.00 GiB"]
    assert [numbers.percent(value) for value in (33.94, 0.0512)] == ["33.9 %", "0.051 %"]
    assert [numbers.seconds(value) for value in (5.04, 90, 5400)] == ["5.0 s", "1.5 min", "1.5 h"]
    assert numbers.listed([0.0001, 2]) == "0.0001, 2" and numbers.signed(1.5) == "+1.50"
