"""Tasks with data, and no model anywhere."""

import csv
import json

import pytest
from test_specs import GOOD, changed

import benchmark_suite
from benchmark_suite import declared
from benchmark_suite.task_spec import DELIMITER
from nemo_tiedlora.errors import UsageError


def oracle(task, example):
    """What a model that knows the answer predicts."""
    if task.spec.prediction.kind == "generate":
        return example.references[0] if task.spec.metrics[0] in ("pearson", "squad_em") else example.target
    return [0.0 if number == example.label else -1000.0 for number in range(len(example.choices))]


@pytest.fixture
def colours(tmp_path):
    """A folder with a task of a user's own, and the functions to fill it."""

    def make(rows=({"thing": "sky", "label": 1},), spec=GOOD, id="colours-v1"):
        folder = tmp_path / id
        folder.mkdir()
        for split in ("train", "validation", "test"):
            (folder / f"{split}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
        (folder / "colours.yaml").write_text(declared.text(spec | {"id": id}))
        assert benchmark_suite.register_folder(folder) == [id]
        return benchmark_suite.load_task(id), folder

    return make


@pytest.mark.parametrize("id", benchmark_suite.list_tasks())
def test_right_answers_get_the_best_score(id, data_root):
    task = benchmark_suite.load_task(id, data_root)
    examples = task.examples("validation")
    assert all(example.prompt and example.target for example in examples)
    scores = task.score([oracle(task, example) for example in examples])
    assert list(scores) == task.spec.metrics
    for score in scores.values():
        assert score.count == len(examples)
        assert score.value == pytest.approx(100 if task.spec.primary == "bleu" else 1)
        assert score.per_example is None or len(score.per_example) == len(examples)


def test_the_test_split_stays_shut_until_asked_for(data_root):
    task = benchmark_suite.load_task("boolq-v1", data_root)
    task.check(), task.examples("train")
    assert [split for split, _ in task.accesses] == ["train", "validation"]
    task.examples("test"), task.examples("test")
    assert task.accesses[-1] == ("test", str(data_root / "boolq" / "test.jsonl")) and len(task.accesses) == 3


def test_an_unreadable_test_split_goes_unnoticed_until_asked_for(colours):
    task, folder = colours()
    (folder / "test.jsonl").write_text("{broken")
    task.check()
    with pytest.raises(UsageError, match=r"test.jsonl:1'.*not JSON"):
        task.examples("test")
    (folder / "test.jsonl").unlink()
    with pytest.raises(UsageError, match="no test.jsonl, test.parquet or test.csv"):
        benchmark_suite.load_task("colours-v1").check()


@pytest.mark.parametrize(
    ("row", "message"),
    [
        ({"thing": "sky", "label": 2}, "label=2: must be a whole number from 0 to 1"),
        ({"thing": "sky", "label": -1}, "label=-1"),
        ({"thing": "sky", "label": "blue"}, "label='label|int': invalid literal"),
        ({"thing": "sky"}, "'label' is undefined; the row has thing"),
        ({"label": 1}, "prompt='Colour of {{ thing }}:': 'thing' is undefined"),
    ],
)
def test_bad_rows_are_named(colours, row, message):
    id = f"colours-v{abs(hash(message)) % 10**9 + 10}"
    task, _ = colours([{"thing": "sky", "label": 1}, row], id=id)
    with pytest.raises(UsageError) as error:
        task.check()
    assert message in str(error.value) and f"{id}.train[1]." in str(error.value)


def test_without_choices_a_choice_is_a_field_like_any_other(colours):
    spec = {name: GOOD[name] for name in ("description", "source", "recipe")} | {
        "prompt": "Why {{ choice }}?",
        "target": "{{ reason }}",
        "prediction": {"kind": "generate", "max_tokens": 4},
        "metrics": ["exact_match"],
    }
    task, _ = colours([{"choice": "tea", "reason": "It is hot."}], spec, "choice-v1")
    assert [example.prompt for example in task.examples("train")] == ["Why tea?"]


def test_empty_splits_are_named(colours):
    task, _ = colours([], id="colours-v2")
    with pytest.raises(UsageError, match="colours-v2.train=.* has no rows"):
        task.check()


def test_predictions_are_checked(data_root):
    task = benchmark_suite.load_task("boolq-v1", data_root)
    for predictions, message in [
        ([(0, -1)], "the split has 2 examples"),
        (["yes", "no"], "must be 2 log-likelihoods, for example 'validation/0'"),
        ([(0, -1), (0, -1, -2)], "must be 2 log-likelihoods, for example 'validation/1'"),
        ([(0, float("nan"))] * 2, "a log-likelihood is not a number"),
    ]:
        with pytest.raises(UsageError, match=message):
            task.score(predictions)
    with pytest.raises(UsageError, match="must be a text"):
        benchmark_suite.load_task("gsm8k-v1", data_root, limit=1).score([3])


def test_every_file_format_gives_the_same_examples(colours):
    from pyarrow import Table, parquet

    rows = [{"thing": "sky", "label": 1}, {"thing": "blood", "label": 0}]
    task, folder = colours(rows, id="colours-v3")
    expected = task.examples("train")
    (folder / "train.jsonl").unlink()
    parquet.write_table(Table.from_pylist(rows), folder / "train.parquet")
    assert benchmark_suite.load_task("colours-v3").examples("train") == expected
    (folder / "train.parquet").unlink()
    with (folder / "train.csv").open("w", newline="") as file:
        writer = csv.DictWriter(file, ["thing", "label"])
        writer.writeheader(), writer.writerows(rows)
    assert benchmark_suite.load_task("colours-v3").examples("train") == expected


def test_bad_folders_are_named(tmp_path):
    with pytest.raises(UsageError, match="no such folder"):
        benchmark_suite.register_folder(tmp_path / "missing")
    with pytest.raises(UsageError, match="no .yaml file"):
        benchmark_suite.register_folder(tmp_path)
    (tmp_path / "bad.yaml").write_text("id: [")
    with pytest.raises(UsageError, match="not readable as YAML"):
        benchmark_suite.register_folder(tmp_path)
    (tmp_path / "bad.yaml").write_text(declared.text(changed("metrics", ["accc"])))
    with pytest.raises(UsageError, match=r"bad.yaml.colours-v1.metrics='accc'"):
        benchmark_suite.register_folder(tmp_path)
    with pytest.raises(UsageError, match="data_root='nowhere': no such folder"):
        benchmark_suite.load_task("gsm8k-v1", "nowhere")
    with pytest.raises(UsageError, match="limit=0"):
        benchmark_suite.load_task("gsm8k-v1", limit=0)


def test_templates_run_in_a_sandbox(colours):
    spec = changed("prompt", "{{ thing.__class__.__mro__ }}")
    task, _ = colours(spec=spec, id="colours-v4")
    with pytest.raises(UsageError, match="unsafe|undefined"):
        task.examples("train")


def test_instructions_are_those_of_llm_adapters(data_root):
    example = benchmark_suite.load_task("arc-easy-instruct-v1", data_root).examples()[0]
    assert example.prompt == (
        "Below is an instruction that describes a task. Write a response that appropriately completes the request.\n\n"
        "### Instruction:\nPlease choose the correct answer to the question: What warms the Earth?\n\n"
        "Answer1: a stone Answer2: the sun Answer3: a spoon\n\nAnswer format: answer1/answer2/answer3\n\n### Response:"
    )
    assert example.target == "the correct answer is answer2"


def test_a_downloaded_dataset_gives_what_a_data_root_gives(data_root, monkeypatch):
    import datasets

    asked = []

    def load(path, config, split, revision):
        asked.append((path, config, split))
        return datasets.Dataset.from_json(str(data_root / "mnli" / "train.jsonl"))

    monkeypatch.setattr(datasets, "load_dataset", load)
    task = benchmark_suite.load_task("mnli-v1")
    assert (
        task.examples("test_mismatched")[0].prompt
        == benchmark_suite.load_task("mnli-v1", data_root).examples()[0].prompt
    )
    assert asked == [("nyu-mll/glue", "mnli", "validation_mismatched")]

    def fail(*_, **__):
        raise ConnectionError("no network")

    monkeypatch.setattr(datasets, "load_dataset", fail)
    with pytest.raises(UsageError, match="no network; or give --data-root DIR with DIR/mnli/train.jsonl"):
        benchmark_suite.load_task("mnli-v1").check()


def test_continuations_start_with_the_delimiter(data_root):
    for id in benchmark_suite.list_tasks("glue"):
        for example in benchmark_suite.load_task(id, data_root).examples():
            assert all(continuation.startswith(DELIMITER) for _, continuation in example.queries)
