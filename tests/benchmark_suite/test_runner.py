"""Cells on the built-in base: trained, chosen by validation, tested once, recorded, resumed."""

import contextlib
import json
import os
import shutil
import signal
import time
from dataclasses import replace
from pathlib import Path

import forked
import pytest
import torch
import toy

import benchmark_suite
from benchmark_suite.backends import backend
from benchmark_suite.runner import sweep as sweeping
from benchmark_suite.runner.cell import Cell
from benchmark_suite.runner.runner import ATTEMPTS, Runner
from nemo_tiedlora.embedded import base as embedded_base
from nemo_tiedlora.errors import UsageError

ROOT = Path(__file__).parents[2]
DATA = ROOT.parent / "shared" / "data"
SHORT = {"steps": 12, "limit": 24}
pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def base():
    return embedded_base.base()


@pytest.fixture
def runner(base, tmp_path):
    """Makes a runner on fresh results, and cells for it: ``runner(variants, rates)``."""
    opened = []

    def make(variants=("TL6",), rates=(1e-2,), results="results", **changes):
        tasks = sweeping.tasks_named(["before-v1"], None, SHORT["limit"], steps=SHORT["steps"])
        one = Runner(backend("nemo", base), tmp_path / results, tasks).__enter__()
        opened.append(one)
        chosen = sweeping.variants_named(variants, one.backend)
        ranks = changes.get("ranks")
        return one, sweeping.matrix(tasks, chosen, one.backend, ranks, [0], list(rates), SHORT["limit"])

    with toy.clean_megatron():
        yield make
        for one in opened:
            one.__exit__(None, None, None)


def contents(folder):
    """Every file that results are made of, but what differs from run to run: times and memory."""
    found = {}
    for path in sorted(folder.rglob("*")):
        if path.is_file() and ".data" not in path.parts:
            value = path.read_bytes()
            if path.name == "log.txt":
                continue
            if path.name == "result.json":
                result = json.loads(value)
                for name in ("seconds", "tokens_per_second", "peak_memory_bytes"):
                    result.pop(name)
                value = result
            found[str(path.relative_to(folder))] = value
    return found


def test_the_same_seed_gives_the_same_files_and_done_cells_are_left_alone(runner, tmp_path):
    first, cells = runner(("TL6", "CondLoRA"), rates=(1e-2, 1e-3))
    found = sweeping.sweep(first, cells, show=False)
    assert [result["status"] for result in found] == ["done"] * 4
    assert [result["selected"] for result in found].count(True) == 2
    for result in found:
        assert ("metrics" in result) is result["selected"]
        assert result["trainable"] > 0 and result["adapter_bytes"] > 0 and result["peak_memory_bytes"] > 0
    again, cells = runner(("TL6", "CondLoRA"), rates=(1e-2, 1e-3), results="again")
    again.backend._bench = first.backend.bench  # the very base that other cells have used
    sweeping.sweep(again, cells, show=False)
    assert contents(tmp_path / "again") == contents(tmp_path / "results")
    before = {path: path.stat().st_mtime_ns for path in (tmp_path / "results").rglob("*")}
    sweeping.sweep(first, cells, show=False)
    assert {path: path.stat().st_mtime_ns for path in (tmp_path / "results").rglob("*")} == before


def test_the_winner_is_the_best_on_validation_and_the_test_split_is_read_for_it_only(runner):
    one, cells = runner(rates=(1e-2, 1e-6))
    task = one.tasks["before-v1"]
    results = [one.train(cell) for cell in cells]
    assert {split for split, _ in task.accesses} == {"train", "validation"}
    scores = [result["validation"]["exact_match"]["value"] for result in results]
    found = sweeping.sweep(one, cells, show=False)
    assert "test" in {split for split, _ in task.accesses}
    winner = found[scores.index(max(scores))]
    assert winner["selected"] and winner["metrics"]["exact_match"]["count"] == SHORT["limit"]


def test_a_failed_cell_is_recorded_and_stops_no_other(runner):
    one, (bad, good) = runner(("selective", "TL6"))
    variant = replace(bad.variant, settings={"tunable_base_param_names": ["no_such_name"]})
    found = sweeping.sweep(one, [bad := replace(bad, variant=variant), good], show=False)
    assert [result["status"] for result in found] == ["failed", "done"]
    log = (bad.folder(one.results) / "log.txt").read_text()
    assert "no_such_name" in found[0]["error"] and "Traceback" in log


def test_the_log_says_what_happened(runner):
    one, (cell,) = runner()
    sweeping.sweep(one, [cell], show=False)
    log = (cell.folder(one.results) / "log.txt").read_text()
    steps = SHORT["steps"]
    for line in ("before-v1, TL6, r", f"step {steps} of {steps}: validation loss", "validation: exact", "test: exact"):
        assert line in log, line
    assert "Traceback" not in log


def test_every_split_to_test_on_is_tested(base, data_root, tmp_path):
    root = tmp_path / "data"
    shutil.copytree(data_root / "mnli", root / "mnli")
    shutil.copy(root / "mnli" / "test.jsonl", root / "mnli" / "test_mismatched.jsonl")
    tasks = sweeping.tasks_named(["mnli-v1"], root, None, steps=2)
    nemo = backend("nemo", base)
    cells = sweeping.matrix(tasks, sweeping.variants_named(["TL6"], nemo), nemo, None, [0], [1e-2], None)
    with toy.clean_megatron(), Runner(nemo, tmp_path / "results", tasks) as one:
        (found,) = sweeping.sweep(one, cells, show=False)
    assert found["metrics"]["acc"] == found["metrics"]["acc_mismatched"]
    files = [cells[0].folder(tmp_path / "results") / f"predictions{which}.jsonl" for which in ("", "_mismatched")]
    rows, further = ([json.loads(line)["prediction"] for line in file.read_text().splitlines()] for file in files)
    assert rows == further


def test_a_cell_that_kills_its_process_is_given_up_and_can_be_retried(runner):
    one, (cell,) = runner()
    cell.folder(one.results).mkdir(parents=True)
    (cell.folder(one.results) / "started.json").write_text(json.dumps({"attempts": ATTEMPTS}))
    (found,) = sweeping.sweep(one, [cell], show=False)
    assert found["status"] == "failed" and "killed" in found["error"]
    (found,) = sweeping.sweep(one, [cell], retry_failed=True, show=False)
    assert found["status"] == "done"


def test_a_cell_that_kills_its_process_while_it_is_tested_is_given_up_too(runner):
    one, (cell,) = runner()
    one.train(cell)
    (cell.folder(one.results) / "started.json").write_text(json.dumps({"attempts": ATTEMPTS}))
    (found,) = sweeping.sweep(one, [cell], show=False)
    assert found["status"] == "failed" and "killed" in found["error"]
    assert json.loads((cell.folder(one.results) / "result.json").read_text()) == found


def test_being_stopped_is_no_fault_of_a_cell(runner, monkeypatch):
    one, (cell,) = runner()

    def stopped(*_, **__):
        raise KeyboardInterrupt

    with monkeypatch.context() as patched:
        patched.setattr(type(one.backend.bench), "trained", stopped)
        for _ in range(ATTEMPTS + 1):
            with pytest.raises(KeyboardInterrupt):
                sweeping.sweep(one, [cell], show=False)
    (found,) = sweeping.sweep(one, [cell], show=False)
    assert found["status"] == "done"


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_a_sweep_told_to_end_says_so_by_its_exit_code(base, tmp_path, number):
    arguments = ["sweep", "--tasks", "before-v1", "--variants", "TL5", "--results", str(tmp_path)]
    process = command(*arguments)
    wait_for("started.json", tmp_path)
    time.sleep(2)
    if number == signal.SIGINT:  # a terminal sends it to both
        os.kill(*children(process), number)
    process.send_signal(number)
    code, _, err = process.finish(100)
    assert code == 128 + number, err[-2000:]
    assert f"ended by {number.name}; the same command goes on from here" in err


def test_baselines_leave_the_base_as_it_was(runner):
    """Full fine-tuning and NeMo's own schemes, then the first variant again: to the bit what it was."""
    one, cells = runner(
        ("TL6", "full", "NeMo LoRA", "IA3", "p-tuning", "selective", "sequential adapter", "parallel adapter")
    )
    tl6, *others = cells
    first = one.train(tl6)
    for cell in others:
        assert one.train(cell)["status"] == "trained", one.result(cell)["error"]
    one.forget(tl6)
    again = one.train(tl6)
    assert again["validation_losses"] == first["validation_losses"]


def test_in_bfloat16_too(base, tmp_path):
    names = ["TL6", "DynaLoRA", "full", "selective", "parallel adapter"]
    tasks = sweeping.tasks_named(["before-v1"], None, 8, steps=4)
    nemo = backend("nemo", base, "bf16")
    cells = sweeping.matrix(tasks, sweeping.variants_named(names, nemo), nemo, None, [0], [1e-2], 8)
    with toy.clean_megatron(), Runner(nemo, tmp_path, tasks) as one:
        found = sweeping.sweep(one, cells, show=False)
        one.forget(cells[0])
        (again,) = sweeping.sweep(one, cells[:1], show=False)
        kinds = {parameter.dtype for parameter in one.backend.bench.model.parameters()}
    assert [result["error"] for result in found] == [None] * len(names)
    assert again["validation_losses"] == found[0]["validation_losses"]
    assert kinds == {torch.bfloat16}


def test_parts_of_a_sweep_are_all_of_it():
    spec, variants = benchmark_suite.spec("before-v1"), list(map(benchmark_suite.variant, ["TL6", "LoRA"]))
    cells = [
        Cell(spec, variant, 8, seed, rate, "base", "data")
        for variant in variants for seed in range(4) for rate in (1e-2, 1e-3)
    ]  # fmt: skip
    parts = [sweeping.part_of(cells, f"{number}/3") for number in (1, 2, 3)]
    assert sorted(cell.hash for part in parts for cell in part) == sorted(cell.hash for cell in cells)
    for part in parts:  # learning rates of one contest are in one place
        assert len(part) == 2 * len({cell.contest.hash for cell in part})
    for wrong in ("0/3", "4/3", "2", "a/b", "1/0"):
        with pytest.raises(UsageError, match=f"^part='{wrong}': write which part of how many"):
            sweeping.part_of(cells, wrong)


def command(*arguments):
    return forked.Script("-m", "benchmark_suite", *arguments, cwd=ROOT)


def children(process):
    return list(map(int, Path(f"/proc/{process.pid}/task/{process.pid}/children").read_text().split()))


def wait_for(name, folder):
    deadline = time.monotonic() + 200
    while not list(folder.rglob(name)) and time.monotonic() < deadline:
        time.sleep(0.05)


def test_a_killed_sweep_goes_on_where_it_was(base, tmp_path):
    arguments = ["sweep", "--tasks", "before-v1,second-v1", "--variants", "TL5,LoRA", "--lrs", "1e-2",
                 "--steps", "30", "--limit", "32", "--results", str(tmp_path), "--json"]  # fmt: skip
    killed = command(*arguments)
    wait_for("result.json", tmp_path)
    killed.send_signal(signal.SIGKILL)
    killed.finish()
    done = {path: path.stat().st_mtime_ns for path in tmp_path.rglob("predictions.jsonl")}
    code, out, err = command(*arguments).finish(400)
    assert code == 0, err[-2000:]
    assert [result["status"] for result in json.loads(out)["results"]] == ["done"] * 4
    assert all(path.stat().st_mtime_ns == time_ns for path, time_ns in done.items())


def test_a_sweep_survives_what_kills_its_process(base, tmp_path):
    """One cell is killed whenever it trains: it is given up, and the others end well."""
    arguments = ["sweep", "--tasks", "before-v1", "--variants", "TL5,LoRA", "--lrs", "1e-2", "--steps", "8",
                 "--limit", "8", "--results", str(tmp_path), "--json"]  # fmt: skip
    process = command(*arguments)
    killed = 0
    while process.poll() is None:
        for started in tmp_path.glob("before-v1/TL5/*/started.json"):
            with contextlib.suppress(FileNotFoundError):
                attempts = json.loads(started.read_text())["attempts"]
                if attempts > killed:
                    os.kill(*children(process), signal.SIGKILL)
                    killed = attempts
        time.sleep(0.02)
    code, out, err = process.finish()
    found = {result["variant"]: result for result in json.loads(out)["results"]}
    assert code == 1 and killed == ATTEMPTS, err[-2000:]
    assert found["LoRA"]["status"] == "done" and found["TL5"]["status"] == "failed"
    assert "killed" in found["TL5"]["error"] and err.count("killed by SIGKILL") == ATTEMPTS


def test_a_mistake_is_refused_by_name_before_anything_is_loaded(tmp_path):
    cases = {
        ("--tasks", "gsm9k-v1"): "did you mean 'gsm8k-v1'",
        ("--variants", "TL7"): "TL7",
        ("--seeds", "x"): "seeds='x': write whole numbers",
        ("--base", "missing.nemo"): "missing.nemo': no such file",
        ("--variants", "LoRA,TL6", "--ranks", "4,500"): "LoRA.rank=500: larger than the layer",
    }
    for arguments, message in cases.items():
        code, _, err = command("sweep", "--results", str(tmp_path / "r"), *arguments).finish(100)
        assert code == 2 and message in err and err.count("\n") == 1, (arguments, err)


REAL = [id for id in benchmark_suite.list_tasks() if benchmark_suite.spec(id).source.path]


@pytest.mark.skipif(not DATA.is_dir(), reason="the real rows are not beside the checkout")
@pytest.mark.parametrize(
    "ids",
    [
        ["boolq-v1", "boolq-instruct-v1", "dialogsum-v1", "gsm8k-v1", "stsb-v1"],
        pytest.param(REAL, marks=pytest.mark.thorough),
    ],
    ids=["some", "all"],
)
def test_tasks_go_from_real_rows_to_the_report(base, tmp_path, ids):
    """A few steps on a few rows: this is about every task's way through, not about scores."""
    assert len(REAL) >= 20
    sizes = ("--steps", "2", "--limit", "6", "--max-seq-length", "128", "--lrs", "1e-2")
    where = ("--data-root", str(DATA), "--results", str(tmp_path))
    arguments = ["sweep", "--tasks", ",".join(ids), "--variants", "TL6", *sizes, *where]
    code, out, err = command(*arguments, "--json").finish(1500)
    assert code == 0, err[-2000:]
    for result in json.loads(out)["results"]:
        assert result["status"] == "done", result
        assert all(score["count"] == 6 for score in result["metrics"].values())
        rows = (next(tmp_path.glob(f"{result['task']}/TL6/*/predictions.jsonl"))).read_text().splitlines()
        assert len(rows) == 6
    code, out, err = command("report", str(tmp_path), "--json").finish(200)
    assert code == 0, err[-2000:]
    assert {id for id in ids if id in out} == set(ids)
