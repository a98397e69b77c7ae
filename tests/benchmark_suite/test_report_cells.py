"""Reading results: what is wrong with one is named and does not stop the others."""

import json

import pytest
from report_results import metric, write

from benchmark_suite.report.cells import load
from nemo_tiedlora.errors import UsageError


def test_a_result_is_read_wherever_it_lies(tmp_path):
    write(tmp_path / "deep" / "er" / "one", [1, 0], seed=3, lr=None)
    (cell,) = load(tmp_path).cells
    assert (cell.seed, cell.lr, cell.test.value, cell.test.count) == (3, None, 50.0, 2)
    assert cell.folder == tmp_path / "deep" / "er" / "one"


@pytest.mark.parametrize(
    ("text", "reason"),
    [
        ('{"cell": ', "Expecting value"),
        ("[]", "not an object"),
        ("{}", "missing: cell, task, variant, seed, status"),
        (b"\xff", "can't decode"),
        ({"rank": "8"}, "rank='8': not a int"),
        ({"rank": True}, "rank=True: not a int"),
        ({"status": "half"}, "status='half': none of trained, done, failed"),
        ({"metrics": {"f1": metric(1.0)}}, "primary='exact_match': not among its metrics (f1)"),
        ({"metrics": {"exact_match": 3}}, "metrics.exact_match: not an object"),
        ({"metrics": {"exact_match": metric(float("nan"))}}, "metrics.exact_match.value=nan: not a finite number"),
        ({"metrics": {"exact_match": metric(1.0)}, "trainable": 0}, "trainable=0: must be at least 1"),
    ],
)
def test_a_broken_result_is_listed_with_the_reason(tmp_path, text, reason):
    write(tmp_path / "good", [1, 0])
    path = write(tmp_path / "bad") / "result.json"
    if isinstance(text, dict):
        text = json.dumps(json.loads(path.read_text()) | text)
    path.write_bytes(text if isinstance(text, bytes) else text.encode())
    results = load(tmp_path)
    assert [cell.cell for cell in results.cells] == ["good"]
    (broken,) = results.broken
    assert broken.path == "bad/result.json" and reason in broken.reason and "\n" not in broken.reason


def test_no_results_is_a_mistake(tmp_path):
    with pytest.raises(UsageError, match="no result.json below it"):
        load(tmp_path)
    with pytest.raises(UsageError, match="no such folder"):
        load(tmp_path / "missing")
