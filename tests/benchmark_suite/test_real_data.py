"""Every task on real rows, where a data root lies beside the checkout; nothing here is needed elsewhere."""

import os
from pathlib import Path

import pytest
from test_task import oracle

import benchmark_suite

DATA = Path(os.environ.get("BENCHMARK_DATA_ROOT", Path(__file__).parents[2].parent / "shared" / "data"))
pytestmark = pytest.mark.skipif(not DATA.is_dir(), reason="no data root beside the checkout")


TASKS = [id for id in benchmark_suite.list_tasks() if not benchmark_suite.spec(id).source.generated]


@pytest.mark.parametrize("id", TASKS)
def test_all_rows_fit_and_right_answers_score_best(id):
    if not (DATA / benchmark_suite.spec(id).source.name).is_dir():
        pytest.skip("no such dataset there")
    task = benchmark_suite.load_task(id, DATA)
    task.check()
    examples = task.examples("validation")
    scores = task.score([oracle(task, example) for example in examples])
    best = 100 if task.spec.primary == "bleu" else 1
    assert scores[task.spec.primary].value == pytest.approx(best) and scores[task.spec.primary].count == len(examples)
    assert [split for split, _ in task.accesses] == ["train", "validation"]
