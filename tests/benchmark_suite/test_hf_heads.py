"""Heads on encoders, for classes and for a number: as transformers itself would train them, and scored as GLUE is."""

import json
import os
from pathlib import Path

import hf_cells
import pytest
import torch
import transformers
from peft import PeftModel
from scipy import stats
from sklearn import metrics

import benchmark_suite
from benchmark_suite import registry
from benchmark_suite.backends import backend
from benchmark_suite.backends.hf.rows import shuffled_batches
from nemo_tiedlora import huggingface

DATA = Path(os.environ.get("BENCHMARK_DATA_ROOT", Path(__file__).parents[2].parent / "shared" / "data"))
SHORT = {"steps": 8, "batch_size": 4, "max_seq_length": 40, "warmup_steps": 3}


def reference(folder, examples, outputs, lr=1e-2, seed=3):
    """Validation losses of full fine-tuning in transformers' own words, on examples that are validated on too."""
    tokenizer = transformers.AutoTokenizer.from_pretrained(folder)
    config = transformers.AutoConfig.from_pretrained(folder, num_labels=outputs)
    torch.manual_seed(0)
    model = transformers.AutoModelForSequenceClassification.from_pretrained(folder, config=config)
    torch.manual_seed(seed)
    model.classifier.apply(model._init_weights)

    def loss(batch):
        inputs = tokenizer(*zip(*(list(each.texts) for each in batch), strict=True), padding=True, truncation=True,
                           max_length=SHORT["max_seq_length"], return_tensors="pt")  # fmt: skip
        labels = torch.tensor([each.label if each.number is None else each.number for each in batch])
        return model(**inputs, labels=labels).loss

    optimizer = torch.optim.AdamW(model.parameters(), lr, weight_decay=0.0)
    schedule = transformers.get_linear_schedule_with_warmup(optimizer, SHORT["warmup_steps"], SHORT["steps"])
    losses = []
    for step, batch in enumerate(shuffled_batches(len(examples), SHORT["batch_size"], SHORT["steps"], seed), 1):
        model.train()
        loss([examples[number] for number in batch]).backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        schedule.step()
        optimizer.zero_grad()
        if step % 4 == 0:
            model.eval()
            with torch.no_grad():
                losses.append([step, float(loss(examples))])
    return losses


@pytest.mark.parametrize(("task", "outputs"), [("mrpc-v1", 2), ("mnli-v1", 3), ("stsb-v1", 1)])
def test_a_head_is_trained_as_transformers_does_it(models, data_root, tmp_path, task, outputs):
    """Dropout, the head's start, the loss, AdamW, the schedule."""
    (found,), _ = hf_cells.swept(models("roberta"), tmp_path, ["full"], [task], data_root, **SHORT)
    examples = registry.load_task(task, data_root).examples("train")
    expected = reference(models("roberta"), examples, outputs)
    assert found["validation_losses"] == [[step, pytest.approx(loss, abs=1e-4)] for step, loss in expected]


def predictions(folder):
    return [json.loads(line) for line in (folder / "predictions.jsonl").open()]


@pytest.mark.parametrize("root", ["invented", pytest.param("real", marks=pytest.mark.skipif(
    not DATA.is_dir(), reason="the real rows are not beside the checkout"))])  # fmt: skip
def test_scores_are_those_of_the_predictions_and_kept_adapters_give_these(models, data_root, tmp_path, root):
    """Accuracy and F1, Matthews, Pearson and Spearman, on a head that chooses and one that says a number."""
    where = data_root if root == "invented" else DATA
    tasks, variants = ["cola-v1", "mrpc-v1", "stsb-v1"], ["CondLoRA", "PEFT LoRA"]
    found, cells = hf_cells.swept(models("roberta"), tmp_path, variants, tasks, where, limit=12, **SHORT)
    for result, cell in zip(found, cells, strict=True):
        assert result["error"] is None and result["head"] and result["host"] == "hf"
        rows = predictions(cell.folder(tmp_path))
        examples = registry.load_task(cell.task.id, where, 12).examples("test")
        assert [row["id"] for row in rows] == [example.id for example in examples]
        if cell.task.id == "stsb-v1":
            said, right = [float(row["prediction"]) for row in rows], [example.number for example in examples]
            expected = {"pearson": stats.pearsonr(said, right)[0], "spearman": stats.spearmanr(said, right)[0]}
        else:
            said = [max(range(2), key=row["prediction"].__getitem__) for row in rows]
            right = [example.label for example in examples]
            expected = {"acc": metrics.accuracy_score(right, said), "f1": metrics.f1_score(right, said),
                        "mcc": metrics.matthews_corrcoef(right, said)}  # fmt: skip
        for name in cell.task.metrics:
            assert result["metrics"][name]["value"] == pytest.approx(expected[name], abs=1e-6), name
        outputs = 1 if cell.task.id == "stsb-v1" else 2
        kept = outputs_of_kept(models("roberta"), cell, tmp_path, [example.texts for example in examples], outputs)
        for row, own in zip(rows, kept, strict=True):
            said = row["prediction"]
            assert own == pytest.approx([float(said)] if outputs == 1 else said, abs=1e-4)


def outputs_of_kept(folder, cell, results, texts, outputs):
    """What the model says with the cell's adapter, by the libraries that read it."""
    model = transformers.AutoModelForSequenceClassification.from_pretrained(folder, num_labels=outputs)
    if cell.variant.is_peft:
        model = PeftModel.from_pretrained(model, cell.folder(results) / "adapter")
    else:
        huggingface.load(model, cell.folder(results) / "adapter")
    tokenizer = transformers.AutoTokenizer.from_pretrained(folder)
    cut = {"truncation": True, "max_length": SHORT["max_seq_length"], "return_tensors": "pt"}
    with torch.no_grad():
        return [model.eval()(**tokenizer(*each, **cut)).logits[0].tolist() for each in texts]


def test_the_weights_with_the_best_score_are_kept_not_those_with_the_lowest_loss(models, tmp_path):
    """A loss that grows with scores that grow, which papers report, must not keep the first."""
    on = backend("hf", models("roberta"))
    task = hf_cells.sweeping.tasks_named(["before-v1"], None, 4)  # any; the rows are made here
    rows = [benchmark_suite.Example(str(n), "", "a", ("a",), ("a", "b"), n % 2, (), (f"text {n}",)) for n in range(4)]
    scores = iter([0.2, 0.9, 0.4])
    recipe = hf_cells.replace(task["before-v1"].spec.recipe, **SHORT | {"steps": 6, "val_interval": 2, "patience": 2})
    training = hf_cells.Training(
        benchmark_suite.variant("TL6"), 4, rows, rows, recipe, 1e-2, 0, tmp_path, head=2, score=lambda _: next(scores)
    )
    with on.trained(training) as trained:
        assert trained.facts.best_step == 4 and [step for step, _ in trained.facts.losses] == [2, 4, 6]


def test_heads_are_in_no_size_but_their_own(models, data_root, tmp_path):
    """As in the papers' tables: CondLoRA has r(in + out) parameters for each of two targets, LoRA in each layer."""
    variants = ["CondLoRA", "DynaLoRA", "PEFT LoRA"]
    found, _ = hf_cells.swept(models("roberta"), tmp_path, variants, ["mrpc-v1"], data_root, limit=4, **SHORT)
    assert [result["trainable"] for result in found] == [2 * 8 * 96, 3 * 2 * 8 * 96, 3 * 3 * 8 * 96]
    assert {result["head_parameters"] for result in found} == {48 * 48 + 48 + 48 * 2 + 2}
    assert [result["percent_of_lora"] for result in found] == [pytest.approx(33.33), 100, 100]


def test_a_decoder_takes_a_head_where_one_is_wanted(models, data_root, tmp_path):
    for name in ("llama", "gpt2"):
        found, cells = hf_cells.swept(
            models(name), tmp_path, ["TL6", "PEFT LoRA"], ["mrpc-v1"], data_root, head=True, limit=4, **SHORT
        )
        assert [result["error"] for result in found] == [None, None] and all(cell.head for cell in cells)
        as_text, twins = hf_cells.swept(models(name), tmp_path, ["TL6"], ["mrpc-v1"], data_root, limit=4, **SHORT)
        assert as_text[0]["error"] is None and not twins[0].head
        assert twins[0].hash != cells[0].hash and twins[0].data_sha256 != cells[0].data_sha256
