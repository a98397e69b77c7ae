"""Prompt templates reach the model as they were written, whatever letters are in them."""

import pytest

from nemo_tiedlora.job.finetune import _escaped


@pytest.mark.parametrize(
    ("written", "read"),
    [
        ("Frage: {q}\\nAntwort für {a}", "Frage: {q}\nAntwort für {a}"),
        ("{q} → {a}", "{q} → {a}"),
        ("{q}\n{a}", "{q}\n{a}"),
        ("C:\\\\new {a}", "C:\\new {a}"),
    ],
)
def test_nemo_reads_what_was_written(written, read):
    assert _escaped(written).encode("utf-8").decode("unicode_escape") == read  # what NeMo's dataset does with it
