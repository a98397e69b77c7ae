"""The tokenizer gives every text back."""

import pytest

from nemo_tiedlora.embedded import base, language, tasks, tokenizer


@pytest.fixture(scope="module")
def pieces():
    return tokenizer.load(base.FOLDER / base.TOKENIZER)


@pytest.mark.parametrize(
    "text",
    [
        "",
        "a",
        " ",
        "\n",
        "  two  spaces  ",
        "line\n\n  break\r\n\ttab",
        "日本語 é ü ß 🎉👩‍🚀 \u200b\u0301",
        "def f(x):\n    return {x: '\\n'}",
        "".join(map(chr, range(32, 127))),
    ],
)
def test_round_trip(pieces, text):
    assert pieces.decode(pieces.encode(text)) == text


def test_words_of_the_language_are_one_piece_each(pieces):
    words = {word for items in language.LISTS.values() for word in items} | {*tokenizer.TASK_WORDS, language.NONE}
    assert {word: len(pieces.encode(word)) for word in words} == dict.fromkeys(words, 1)


def test_special_pieces(pieces):
    ids = pieces.unk_id(), pieces.bos_id(), pieces.eos_id(), pieces.pad_id()
    assert ids == (tokenizer.UNKNOWN, tokenizer.BEGIN, tokenizer.END, tokenizer.PAD)
    assert pieces.get_piece_size() == tokenizer.VOCABULARY


def test_training_is_deterministic(tmp_path):
    first, again = (tokenizer.train(tmp_path / name).read_bytes() for name in ("first", "again"))
    assert first == again


def test_question_and_answer_apart_are_the_whole(pieces):
    """What NeMo's data set does with `{input} {output}`, and what the base was trained on."""
    for task in tasks.TASKS:
        for row in tasks.rows(task, "test", 20):
            whole = tasks.PROMPT_TEMPLATE.format(**row)
            assert pieces.encode(row["input"]) + pieces.encode(row["output"]) == pieces.encode(whole)
