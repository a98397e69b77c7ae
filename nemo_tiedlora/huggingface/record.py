"""What a base says of the transformers model that it was made of: the files that are written again on the way back."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from nemo_tiedlora.errors import UsageError
from nemo_tiedlora.huggingface.families import CONFIG, read_config
from nemo_tiedlora.model.data import ModelConfig

#: Under this name a base's ``model_config.yaml`` has them, as JSON by file: text, in which nothing can be called.
RECORD = "huggingface"
GENERATION = "generation_config.json"
#: Both are part of a file that is limited itself.
MOST_RECORDED = 2**20


def recorded(folder: Path, config: dict[str, Any]) -> dict[str, str]:
    """What to keep of a model's folder.

    Args:
        config: the content of its ``config.json``.

    Raises:
        UsageError: too large, or how it generates text is not readable.
    """
    files = {CONFIG: config}
    if (folder / GENERATION).is_file():
        files[GENERATION] = read_config(folder, GENERATION)
    kept = {name: _text(content) for name, content in files.items()}
    for name, text in kept.items():
        if len(text) > MOST_RECORDED:
            raise UsageError("model", str(folder / name), f"larger than it can be: {len(text):,} bytes")
    return kept


def _text(content: dict[str, Any]) -> str:
    # A base's config refers to nothing, and is looked through for what would.
    return json.dumps(content).replace("${", "\\u0024{")


def read_record(model: ModelConfig) -> dict[str, dict[str, Any]]:
    """The files that a base's config has the content of, by name; none, if it was made elsewhere.

    Raises:
        UsageError: damaged.
    """
    kept = model.get(RECORD) or {}
    files: dict[str, Any] = {RECORD: None}
    try:
        if isinstance(kept, dict):
            files = {name: json.loads(kept[name]) for name in (CONFIG, GENERATION) if name in kept}
    except (ValueError, TypeError, RecursionError):
        pass
    if not all(isinstance(content, dict) for content in files.values()):
        raise UsageError(RECORD, "…", f"in the base's config, not the content of a {CONFIG}")
    return files
