"""A data root with a few invented rows of every dataset."""

import json
from pathlib import Path

import pytest
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
