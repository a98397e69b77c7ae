"""What stands in where NeMo takes a tokenizer of Hugging Face from elsewhere than the ``.nemo``."""

from __future__ import annotations

import json
import os
from functools import wraps
from pathlib import Path
from tempfile import TemporaryDirectory

from nemo_tiedlora.model import tokenizer
from nemo_tiedlora.platform.patch import Restore, patch


@patch(needed=lambda: True)
def tokenizer_files_inside(restore: Restore) -> None:
    """NeMo finds a Hugging Face tokenizer by a path or a name on the Hub, so that a `.nemo` works on one machine only.

    It carries single files along, and finds them again: a `.nemo` with `tokenizer.json` as `tokenizer.model` and
    `tokenizer_config.json` as `tokenizer.merge_file` gets its tokenizer from these two.
    """
    from nemo.collections.nlp.models.language_modeling import megatron_base_model

    stock = megatron_base_model.get_nmt_tokenizer

    @wraps(stock)
    def get_nmt_tokenizer(library="sentencepiece", model_name=None, tokenizer_model=None, merges_file=None, **settings):
        inside = library == "huggingface" and model_name is None and tokenizer_model and merges_file
        if not inside:
            return stock(library, model_name, tokenizer_model, merges_file=merges_file, **settings)
        own = tokenizer.settings_of(json.loads(Path(merges_file).read_text(encoding="utf-8")))
        with TemporaryDirectory() as folder:
            tokenizer.write(Path(folder), Path(tokenizer_model).read_bytes(), own)
            settings |= {"use_fast": True, "special_tokens": tokenizer.special_tokens(own)}
            settings |= {"vocab_file": None, "trust_remote_code": False}
            return stock(library, folder, **settings)

    restore.set(megatron_base_model, "get_nmt_tokenizer", get_nmt_tokenizer)


@patch(needed=lambda: "TOKENIZERS_PARALLELISM" not in os.environ)
def tokenizers_before_workers(restore: Restore) -> None:
    """Hugging Face's tokenizers warn of their threads whenever a process that used them starts data workers.

    They have threads for several texts at a time, and NeMo gives them one after another.
    """
    restore.set_item(os.environ, "TOKENIZERS_PARALLELISM", "false")
