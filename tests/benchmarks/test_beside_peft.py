"""What adapters cost beside PEFT's: memory here, on small models; times are those of the page's table."""

import importlib.util
import json
import weakref
from pathlib import Path

import pytest
import torch
import typer
from typer.testing import CliRunner

ROOT = Path(__file__).parents[2]


@pytest.fixture(scope="module")
def benchmark():
    spec = importlib.util.spec_from_file_location("beside_peft", ROOT / "benchmarks" / "beside_peft.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    threads = torch.get_num_threads()
    yield module
    torch.set_num_threads(threads)


def test_no_method_keeps_more_activations_than_what_peft_has_beside_it(benchmark):
    app = typer.Typer()
    app.command()(benchmark.main)
    sizes = ["--hidden", "32", "--layers", "2", "--batch", "2", "--length", "12", "--rank", "4", "--rounds", "2"]
    done = CliRunner().invoke(app, [*sizes, "--json"], catch_exceptions=False)
    found = json.loads(done.stdout)
    assert found["models"].keys() == {"llama", "roberta"}
    for model in found["models"].values():
        for what, rows in model["targets"].items():
            assert rows.keys() == benchmark.OURS.keys()
            for name, row in rows.items():
                assert 0 < row["activation_bytes"] <= row["peft_activation_bytes"], (what, name)
                assert row["time_ratio"] > 0
                if name in ("VeRA", "DoRA"):
                    assert row["activation_bytes"] < row["peft_activation_bytes"], (what, name)


def test_activations_are_what_grows_with_the_batch(benchmark):
    class Model(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.frozen, self.trained = torch.ones(4, 4), torch.nn.Parameter(torch.ones(4, 4))

        def forward(self, input_ids, labels):
            x = input_ids.exp()  # which the product keeps for its weight's gradient
            return type("Output", (), {"loss": (x @ (self.trained * self.frozen)).sum()})

    one = benchmark.Trained(Model(), torch.ones(3, 4), None)
    assert benchmark.activations(one) == (3 * 4 * 4, 4 * 4 * 4)  # bytes of x, and of what scales the trained matrix


def test_nothing_is_kept_once_it_is_measured(benchmark):
    class Model(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.trained, self.seen = torch.nn.Parameter(torch.ones(4)), []

        def forward(self, input_ids, labels):
            x = (input_ids * self.trained).exp()  # an operation that keeps its own output
            self.seen.append(weakref.ref(x))
            return type("Output", (), {"loss": x.sum()})

    model = Model()
    benchmark.activations(benchmark.Trained(model, torch.ones(3, 4), None))
    assert len(model.seen) == 2 and all(tensor() is None for tensor in model.seen)


def test_the_page_has_the_table_of_its_results(benchmark):
    found = json.loads((ROOT / "docs" / "beside-peft.json").read_text(encoding="utf-8"))
    page = (ROOT / "docs" / "beside-peft.md").read_text(encoding="utf-8")
    for one in found["models"].values():
        head, *rows = [f"| {' | '.join(cells)} |" for cells in (benchmark.columns_of(one), *benchmark.rows_of(one))]
        line = f"|---|---|{'---:|' * 2 * len(one['targets'])}"
        assert "\n".join(["", head, line, *rows, ""]) in page
