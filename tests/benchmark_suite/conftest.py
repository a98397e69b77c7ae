"""A data root with a few invented rows of every dataset, and small models."""

import json
from pathlib import Path

import pytest
import small_models
from suite_rows import ROWS


@pytest.fixture(scope="session")
def data_root(tmp_path_factory) -> Path:
    """A folder as ``--data-root`` takes it."""
    root = tmp_path_factory.mktemp("data")
    for name, rows in ROWS.items():
        (root / name).mkdir()
        for split in ("train", "validation", "test"):
            (root / name / f"{split}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return root


@pytest.fixture(scope="session")
def models(tmp_path_factory):
    """``models(name)`` → the folder of a model of ``small_models``, written once."""
    made = {}

    def folder(name):
        if name not in made:
            made[name] = small_models.save(tmp_path_factory.mktemp("models") / name, name)
        return made[name]

    return folder
