"""A Hugging Face tokenizer as two files of data: how text becomes tokens, and settings such as its special tokens.

transformers lets the settings name a class, files and code to be loaded; what is kept of them here names none.
"""

import json
from pathlib import Path
from typing import Any

#: In a folder of a Hugging Face model, and, after a checksum, in a ``.nemo``.
TOKENIZER, SETTINGS = "tokenizer.json", "tokenizer_config.json"
TOKENS = ("bos_token", "eos_token", "unk_token", "sep_token", "pad_token", "cls_token", "mask_token")
MORE_TOKENS = "additional_special_tokens"
_KEPT = (*TOKENS, MORE_TOKENS, "added_tokens_decoder", "chat_template", "add_prefix_space", "model_max_length",
         "clean_up_tokenization_spaces", "padding_side", "truncation_side")  # fmt: skip


def settings_of(content: dict[str, Any]) -> dict[str, Any]:
    """What of a ``tokenizer_config.json`` is data, for the class that does what ``tokenizer.json`` says."""
    kept = {name: content[name] for name in _KEPT if content.get(name) is not None}
    # Of the class that had the name, what models that only continue text take.
    return {**kept, "tokenizer_class": "PreTrainedTokenizerFast", "model_input_names": ["input_ids", "attention_mask"]}


def special_tokens(settings: dict[str, Any]) -> dict[str, list[str]]:
    """What NeMo must be told, because it takes the tokenizer to have none of these otherwise."""
    return {MORE_TOKENS: [text_of(token) for token in settings.get(MORE_TOKENS) or []]}


def text_of(token: str | dict[str, Any]) -> str:
    """The text of a special token, which settings say with or without how it is looked for."""
    return str(token["content"] if isinstance(token, dict) else token)


def write(folder: Path, tokenizer: bytes, settings: dict[str, Any]) -> None:
    """Write both files into ``folder``, from which ``AutoTokenizer`` loads them."""
    (folder / TOKENIZER).write_bytes(tokenizer)
    (folder / SETTINGS).write_text(json.dumps(settings, ensure_ascii=False), encoding="utf-8")
