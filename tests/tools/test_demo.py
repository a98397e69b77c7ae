"""`make demo`: what the fine-tuning script is told, and the rows it gets."""

import json
import subprocess
import sys
from pathlib import Path
from runpy import run_path

import pytest

from nemo_tiedlora.errors import UsageError

ROOT = Path(__file__).parents[2]


@pytest.fixture
def demo(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    return run_path(str(ROOT / "tools" / "demo.py"))


def written(told):
    """The rows of both splits, from where the script is told to find them."""
    files = {word.partition("=")[0]: word.partition("=")[2].strip("[]") for word in told if "file_names" in word}
    return {
        name.split(".")[2]: [json.loads(line) for line in Path(path).read_text().splitlines()]
        for name, path in files.items()
    }


def test_without_anything_it_is_the_script_with_its_defaults(demo):
    assert demo["settings"](None, None) == ["model.peft.peft_scheme=tied_lora"]
    assert not Path("nemo_experiments").exists()


def test_a_base_learns_to_answer_letters_of_which_none_is_seen_before(demo):
    told = demo["settings"]("smollm2", None)
    assert (
        "model.restore_from_path=smollm2" in told and "model.data.validation_ds.metric.name=exact_string_match" in told
    )
    rows = written(told)
    train, validation = (
        {row["messages"][1]["content"] for row in rows[split]} for split in ("train_ds", "validation_ds")
    )
    assert len(train) == 240 and len(validation) == 16 and not train & validation
    assert all(row["messages"][2]["content"].endswith("Yours, Tilda") for row in rows["train_ds"])


def test_rows_of_ones_own_are_held_out_for_before_and_after(demo):
    content = [{"q": f"question {number}", "note": "short", "a": "yes " * 300} for number in range(40)]
    content.append({"messages": [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}]})
    Path("my.jsonl").write_text("".join(json.dumps(row) + "\n" for row in content))
    told = demo["settings"]("smollm2", "my.jsonl")
    rows = written(told)
    assert [row["messages"][0]["content"] for row in rows["validation_ds"]] == [
        *(f"question {number}\nshort" for number in (0, 10, 20, 30)), "a",
    ]  # fmt: skip
    assert len(rows["train_ds"]) == 36 and rows["train_ds"][0]["messages"][1]["content"] == "yes " * 300
    steps = int(next(word.partition("=")[2] for word in told if word.startswith("trainer.max_steps=")))
    assert 10 <= steps < 30  # long rows, fewer steps


@pytest.mark.parametrize(
    ("content", "said"),
    [
        (None, "DATA='my.jsonl': no such file"),
        ('{"a": "b", "c": "d"}\n', "DATA='my.jsonl': too short"),
        ('{"a": "b", "c": "d"}\n{"a": "b"}\n', "DATA='my.jsonl': line 2 has neither messages nor two texts"),
        ("text\n", "DATA='my.jsonl': line 1"),
    ],
)
def test_a_file_that_cannot_be_learned_ends_in_one_line(content, said, demo):
    if content:
        Path("my.jsonl").write_text(content)
    with pytest.raises(UsageError) as error:
        demo["settings"](None, "my.jsonl")
    assert str(error.value).startswith(said)


def test_the_command_ends_in_one_line_too(tmp_path):
    for given, said in (
        ("DATA=nowhere.jsonl", "DATA='nowhere.jsonl': no such file"),
        ("BASSE=x", "did you mean 'BASE'"),
    ):
        done = subprocess.run(
            [sys.executable, ROOT / "tools" / "demo.py", given], cwd=tmp_path, capture_output=True, text=True
        )
        assert done.returncode == 2 and done.stderr.count("\n") == 1 and said in done.stderr
