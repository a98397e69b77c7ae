"""The script that fine-tunes an encoder without NeMo, on texts that a small random one can tell apart."""

import importlib.util
import json
from pathlib import Path

import pytest
import torch
import transformers
import typer
from huggingface import saved_models
from typer.testing import CliRunner

from nemo_tiedlora import huggingface

SCRIPT = Path(__file__).parents[2] / "examples" / "classify.py"


def classify(*arguments):
    spec = importlib.util.spec_from_file_location("classify", SCRIPT)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    app = typer.Typer()
    app.command()(module.main)
    return CliRunner().invoke(app, list(map(str, arguments)))


@pytest.fixture
def arguments(tmp_path):
    config = transformers.BertConfig(
        vocab_size=336, hidden_size=24, num_hidden_layers=2, num_attention_heads=4, intermediate_size=40,
        hidden_dropout_prob=0.0, attention_probs_dropout_prob=0.0,
    )  # fmt: skip
    torch.manual_seed(0)
    transformers.BertModel(config).save_pretrained(tmp_path / "base")
    saved_models.tokenizer(tmp_path / "base")
    settings = json.loads((tmp_path / "base" / "tokenizer_config.json").read_text()) | {"pad_token": "</s>"}
    (tmp_path / "base" / "tokenizer_config.json").write_text(json.dumps(settings))
    texts = [[f"what is {number}?", f"it is {number}."] for number in range(40)]
    rows = [{"first": pair[label], "second": "plus", "label": label} for pair in texts for label in (0, 1)]
    for name, part in (("train", rows[:60]), ("validation", rows[60:])):
        (tmp_path / f"{name}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in part))
    files = ["--train", tmp_path / "train.jsonl", "--validation", tmp_path / "validation.jsonl"]
    return ["--base", tmp_path / "base", *files, "--text", "first", "--text", "second", "--lr", 0.02,
            "--out", tmp_path / "adapter", "--rank", 4]  # fmt: skip


def test_it_learns_and_saves_what_it_learned_with_the_head_and_the_log(arguments, tmp_path):
    dyna = ["--scheme", "dyna_lora", "--settings", '{"active": 2, "period": 2}']
    done = classify(*arguments, *dyna)
    assert done.exit_code == 0, done.exception
    facts = json.loads(done.stdout.splitlines()[-1])
    assert facts["accuracy"] == 1 and facts["steps"] == 5 * 4
    steps = json.loads((tmp_path / "adapter" / "allocations.json").read_text())["active_steps"]
    assert sum(steps) == 2 * facts["steps"]
    model = transformers.BertForSequenceClassification.from_pretrained(tmp_path / "base", num_labels=2).eval()
    tokenizer = transformers.AutoTokenizer.from_pretrained(tmp_path / "base")
    huggingface.load(model, tmp_path / "adapter")
    for label, text in enumerate(("what is 39?", "it is 39.")):
        assert model(**tokenizer(text, "plus", return_tensors="pt")).logits.argmax() == label


@pytest.mark.parametrize(
    ("given", "message"),
    [
        (["--text", "third"], "error: data="),
        (["--settings", "{"], "error: settings='{': not names and values as JSON"),
        (["--scheme", "tide_lora"], "did you mean 'tied_lora'"),
        (["--base", str(SCRIPT.parent)], "transformers cannot load it"),
    ],
)
def test_bad_input_ends_in_one_line(arguments, given, message, tmp_path):
    done = classify(*arguments, *given)
    assert done.exit_code == 2 and message in done.stderr and done.stderr.count("\n") == 1
    assert not list(tmp_path.glob("adapter/*"))
