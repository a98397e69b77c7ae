"""The tokenizer inside a base as transformers' files."""

from __future__ import annotations

import json
from pathlib import Path, PurePosixPath
from tempfile import TemporaryDirectory
from typing import TYPE_CHECKING, Any

from nemo_tiedlora.checkpoint.base import BaseFile
from nemo_tiedlora.console import note
from nemo_tiedlora.errors import UsageError
from nemo_tiedlora.huggingface import sentencepieces
from nemo_tiedlora.model import tokenizer

if TYPE_CHECKING:
    import transformers

#: More than any tokenizer has.
MOST_TOKENIZER = 2**28
IDS = ("bos_token_id", "eos_token_id", "pad_token_id")


def tokenizer_files(base: BaseFile) -> tuple[dict[str, bytes], dict[str, Any]]:
    """The content of the tokenizer's files by name, and its ``vocab_size`` and special tokens as ``config.json`` says.

    Where there is none that transformers' own class could load, nothing but a note of it.

    Raises:
        UsageError: it is damaged.
    """
    section = base.config.get("tokenizer") or {}
    found = {name: _inside(base, section.get(name)) for name in ("model", "merge_file")}
    model, settings = found["model"], found["merge_file"]
    library = section.get("library")
    try:
        if library == "huggingface" and model and settings:
            kept = tokenizer.settings_of(json.loads(settings))
            return _files(model, kept), _facts(_loaded(model, kept))
        if library == "sentencepiece" and model:
            made, kept = sentencepieces.converted(model)
            if made:
                return _files(made, kept), _facts(_loaded(made, kept))
            note(f"transformers' own tokenizers cannot do what the one in {base.archive.path} does; the folder gets it "
                 f"as {sentencepieces.MODEL}, which the sentencepiece package reads")  # fmt: skip
            return {sentencepieces.MODEL: model}, kept
    except (UsageError, ModuleNotFoundError):
        raise
    except Exception as error:  # tokenizers has no class of its own for what it refuses
        raise base.archive.error(f"its tokenizer cannot be loaded ({type(error).__name__}: {error})") from None
    named = section.get("type") or section.get("model")
    note(f"the folder gets no tokenizer: {base.archive.path} has none that transformers' own class could load "
         f"(library {library}, {named}); save the one that it was trained with there (save_pretrained)")  # fmt: skip
    return {}, {}


def _inside(base: BaseFile, named: Any) -> bytes | None:
    """A file of the base that its config names."""
    if not isinstance(named, str) or not named:
        return None
    name = PurePosixPath(named.removeprefix("nemo:")).name
    return base.archive.read(name, MOST_TOKENIZER) if name in base.archive.sizes else None


def _files(content: bytes, settings: dict[str, Any]) -> dict[str, bytes]:
    return {tokenizer.TOKENIZER: content, tokenizer.SETTINGS: json.dumps(settings, ensure_ascii=False).encode()}


def _loaded(content: bytes, settings: dict[str, Any]) -> transformers.PreTrainedTokenizerFast:
    import transformers

    with TemporaryDirectory() as folder:
        tokenizer.write(Path(folder), content, settings)
        return transformers.PreTrainedTokenizerFast.from_pretrained(folder)


def _facts(loaded: transformers.PreTrainedTokenizerFast) -> dict[str, Any]:
    ids = {name: getattr(loaded, name) for name in IDS}
    return {"vocab_size": len(loaded)} | {name: number for name, number in ids.items() if number is not None}
