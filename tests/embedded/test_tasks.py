"""The generated language and the tasks in it."""

import json
import subprocess
import sys
from itertools import islice
from random import Random

import pytest

from nemo_tiedlora.embedded import language, tasks, tokenizer
from nemo_tiedlora.errors import UsageError


def test_equal_seeds_give_equal_documents():
    first, again, other = (list(islice(language.documents(seed), 20)) for seed in (1, 1, 2))
    assert first == again != other


def test_skills_answer_from_the_list():
    for about, exercises in islice(language.documents(0), 50):
        assert len(set(about.items)) == len(about.items)
        for exercise in exercises:
            assert set(exercise.answer.split()) <= {*about.items, language.NONE}


def test_the_base_never_reads_a_word_of_the_tasks():
    texts = (
        f"{about} {' '.join(f'{e.question} {e.answer}' for e in exercises)}"
        for about, exercises in islice(language.documents(0), 500)
    )
    assert not {word.strip(".:") for text in texts for word in text.split()} & set(tokenizer.TASK_WORDS)


@pytest.mark.parametrize("task", tasks.TASKS)
def test_rows_are_what_the_seed_says(task):
    first = tasks.rows(task, "test", 30)
    assert first == tasks.rows(task, "test", 30) != tasks.rows(task, "test", 30, seed=1)
    assert first[:10] == tasks.rows(task, "test", 10)
    for row in first:
        assert row.keys() == {"input", "output"}
        listed = row["input"].split(".")[0].split()
        assert 1 <= len(row["output"].split()) <= 3 and set(row["output"].split()) <= set(listed)


def test_answers():
    items = tuple("abcde")
    for name, expected in dict(before={"b": "a"}, second={"a": "c"}, beside={"b": "a c"}).items():
        answers = {}
        for seed in range(100):
            exercise = tasks.TASKS[name](items, Random(seed))
            asked = next(word.strip(":") for word in exercise.question.split() if word.strip(":") in items)
            answers[asked] = exercise.answer
        assert expected.items() <= answers.items()
    exercise = tasks.TASKS["return"](items[:4], Random(0))
    assert (exercise.question, exercise.answer) == ("Return from d:", "c b a")


def test_no_list_is_in_two_splits():
    lists = {split: set() for split in tasks.SPLITS}
    for task in tasks.TASKS:
        for split, seen in lists.items():
            inputs = [row["input"].split(".")[0] for row in tasks.rows(task, split, 300)]
            assert len(set(inputs)) == len(inputs)
            seen.update(inputs)
    train, validation, test = lists.values()
    assert not (train & validation or train & test or validation & test)


def test_written_files_hold_the_rows(tmp_path):
    files = tasks.write(tmp_path / "data", train=20, validation=5, test=6)
    assert {split: len(file.read_text().splitlines()) for split, file in files.items()} == dict(
        train=20, validation=5, test=6
    )
    assert [json.loads(line) for line in files["test"].read_text().splitlines()] == tasks.rows(tasks.DEMO, "test", 6)


def test_names_are_checked():
    with pytest.raises(UsageError, match="did you mean 'before'"):
        tasks.rows("befor", "test", 1)
    with pytest.raises(UsageError, match="split"):
        tasks.rows("before", "tests", 1)


def test_import_is_light():
    names = ", ".join(f"nemo_tiedlora.embedded.{module}" for module in ("base", "language", "tasks", "tokenizer"))
    code = f"import sys, {names}; assert not {{'torch', 'nemo', 'megatron', 'sentencepiece'}} & set(sys.modules)"
    subprocess.run([sys.executable, "-c", code], check=True)
