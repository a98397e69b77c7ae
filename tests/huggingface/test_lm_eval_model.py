"""lm-evaluation-harness's own command: every sample's result is that of its model hf with the exported adapter."""

import json
import os
from itertools import islice
from pathlib import Path

import forked
import pytest
import twins
import yaml
from random_adapters import adapter_for
from saved_models import TOKENS, save

from nemo_tiedlora.errors import UsageError
from nemo_tiedlora.huggingface.taken_over import take_over

pytest.importorskip("lm_eval")

ROOT = Path(__file__).parents[2]
DATA = Path(os.environ.get("BENCHMARK_DATA_ROOT", ROOT.parent / "shared" / "data"))
#: Task → the file of its rows, how many of them, and its declaration. The longest texts do not fit into the model.
TASKS = {
    "choose": (
        "piqa/validation.jsonl",
        6,
        {
            "output_type": "multiple_choice",
            "doc_to_text": "Question: {{goal}}\nAnswer:",
            "doc_to_choice": "{{[sol1, sol2]}}",
            "doc_to_target": "label",
            "metric_list": [{"metric": "acc"}, {"metric": "acc_norm"}],
        },
    ),
    "answer": (
        "gsm8k/test.jsonl",
        4,
        {
            "output_type": "generate_until",
            "doc_to_text": "Q: {{question}}\nA:",
            "doc_to_target": "{{answer}}",
            "generation_kwargs": {"until": ["\n", "e"], "max_gen_toks": 24, "do_sample": False},
            "metric_list": [{"metric": "exact_match"}],
        },
    ),
    "roll": (
        "squad/validation.jsonl",
        2,
        {
            "output_type": "loglikelihood_rolling",
            "doc_to_text": "",
            "doc_to_target": "{{context}}",
            "metric_list": [{"metric": "word_perplexity"}],
        },
    ),
}


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """With the tasks, a model as transformers saved it and as a base, and an adapter as ours and as PEFT's."""
    if not DATA.is_dir():
        pytest.skip(f"no rows in {DATA}")
    path = tmp_path_factory.mktemp("lm_eval")
    (path / "tasks").mkdir()
    for task, (file, count, declared) in TASKS.items():
        with open(DATA / file, encoding="utf-8") as lines:
            rows = list(islice((row for row in map(json.loads, lines) if _fits(row)), count))
        (path / f"{task}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
        source = {"dataset_path": "json", "dataset_kwargs": {"data_files": {"test": str(path / f"{task}.jsonl")}}}
        (path / "tasks" / f"{task}.yaml").write_text(
            yaml.dump({"task": task, "test_split": "test", **source, **declared})
        )
    save(path / "saved", "llama", vocab_size=TOKENS)
    take_over(path / "saved", path / "base.nemo")
    adapter_for(path / "base.nemo", path / "adapter", "tied_lora", target_modules=["all"], alpha=8.0)
    twins.exported(path / "adapter", path / "base.nemo", "peft-lora", path / "peft")
    return path


def _fits(row):
    return max(len(row.get(name, "")) for name in ("sol1", "sol2")) < 150


def run(folder, *arguments, out):
    """What the harness says: its exit code and standard error, and by task and row the result of every sample."""
    environment = {"HF_HOME": str(folder / "hf"), "HF_HUB_OFFLINE": "1", "HF_DATASETS_OFFLINE": "1"}
    code, _, err = forked.script(
        *arguments, "--include_path", "tasks", "--tasks", ",".join(TASKS), "--log_samples", "--output_path", out,
        cwd=folder, environment=environment,
    )  # fmt: skip
    samples = {}
    for file in (folder / out).rglob("samples_*.jsonl"):
        for line in file.read_text().splitlines():
            sample = json.loads(line)
            samples[file.name.split("_")[1], sample["doc_id"]] = sample["filtered_resps"]
    return code, err, samples


def test_every_sample_is_as_with_hf(folder):
    code, err, expected = run(
        folder, "-m", "lm_eval", "--model", "hf", "--batch_size", 3, "--device", "cpu",
        "--model_args", "pretrained=saved,dtype=float32,peft=peft", out="theirs",
    )  # fmt: skip
    assert code == 0, err[-3000:]
    code, err, found = run(
        folder, "-m", "nemo_tiedlora", "lm-eval", "--model", "nemo_tiedlora", "--batch_size", 2,
        "--model_args", "base=base.nemo,adapter=adapter", out="ours",
    )  # fmt: skip
    assert code == 0, err[-3000:]
    assert len(expected) == sum(count for _, count, _ in TASKS.values()) and expected.keys() == found.keys()
    for (task, number), wanted in expected.items():
        got = found[task, number]
        if task == "answer":
            assert got == wanted, (task, number)
        else:
            for one, other in zip(got, wanted, strict=True):
                one, other = (value if isinstance(value, list) else [value, None] for value in (one, other))
                assert float(one[0]) == pytest.approx(float(other[0]), rel=1e-4, abs=1e-3), (task, number)
                assert one[1] == other[1]
    assert len({str(value) for (task, _), value in found.items() if task == "answer"}) > 1


def test_a_mistake_is_one_line(folder, monkeypatch):
    arguments = "base=base.nemo,adaptor=adapter"
    code, err, _ = run(
        folder, "-m", "nemo_tiedlora", "lm-eval", "--model", "nemo_tiedlora", "--model_args", arguments, out="none"
    )
    assert code == 2 and "Traceback" not in err
    assert err.splitlines()[-1].startswith("error: model_args.adaptor='adapter': did you mean 'adapter'"), err[-2000:]

    from nemo_tiedlora.job.lm_eval_model import NeMoLM

    monkeypatch.chdir(folder)
    for given, said in (
        ({"base": "none.nemo"}, "none.nemo"),
        ({"base": "base.nemo", "adapter": "none"}, "'none'"),
        ({"base": "base.nemo", "max_length": 0}, "max_length=0: must be"),
        ({"base": "base.nemo", "batch_size": "auto"}, "batch_size='auto': must be"),
        ({"base": "base.nemo", "precision": "8"}, "precision='8'"),
    ):
        with pytest.raises(UsageError, match=said):
            NeMoLM(**given)
