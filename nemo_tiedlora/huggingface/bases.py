"""The one door through which a base comes in: whatever a user calls it, it becomes a ``.nemo``."""

from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

from nemo_tiedlora.console import BASES
from nemo_tiedlora.embedded import base as embedded_base
from nemo_tiedlora.errors import UsageError, closest
from nemo_tiedlora.huggingface.families import CONFIG
from nemo_tiedlora.huggingface.smollm2 import NAME as SMOLLM2
from nemo_tiedlora.huggingface.smollm2 import smollm2
from nemo_tiedlora.huggingface.taken_over import base_of, is_model, model_at
from nemo_tiedlora.model.config import nemo_config
from nemo_tiedlora.model.data import ModelConfig

BUILTIN = "builtin"
#: Bases that are called by a name, which no file or folder can take: write ``./smollm2`` for one.
NAMES = (BUILTIN, SMOLLM2)


class Found(NamedTuple):
    """A base that is there.

    Args:
        config: NeMo's, of the model.
        file: makes its ``.nemo`` where it is none yet, and gives its path.
    """

    config: ModelConfig
    file: Callable[[], Path]


def find(
    named: str | Path, field: str = "base", config_of: Callable[[str | Path, str], ModelConfig] = nemo_config
) -> Found:
    """The base that a user has named.

    Args:
        named: a ``.nemo``, the folder of a Hugging Face model, a GGUF file, or one of ``NAMES``.
        field: under which they named it.
        config_of: reads, and checks, a ``.nemo``.

    Raises:
        UsageError: there is none of that name, or it is damaged, or of a kind that cannot be taken over.
    """
    if named == BUILTIN:
        return Found(ModelConfig(embedded_base.MODEL), embedded_base.base)
    path = Path(named)
    if named == SMOLLM2:
        try:
            path = smollm2()
        except UsageError as error:
            raise UsageError(field, SMOLLM2, error.way_out) if error.field == "base" else error from None
    elif is_model(path):
        try:
            model = model_at(path)
        except UsageError as error:
            reason = error.way_out if error.field == "model" else str(error)
            value = error.value if error.field == "model" else str(named)
            raise UsageError(field, value, reason) from None
        return Found(ModelConfig(model.config), lambda: base_of(model))
    elif not path.exists() and (path.name != str(named) or path.suffix):
        raise UsageError(field, str(path), "no such file")
    elif not path.exists():
        raise UsageError(field, str(named), f"no known base: {closest(named, NAMES)}; or name {BASES}")
    elif path.is_dir():
        raise UsageError(field, str(named), f"not a .nemo file, and no Hugging Face model: there is no {CONFIG} in it")
    return Found(config_of(path, field), lambda: path)


def base_at(named: str | Path, field: str = "base") -> Path:
    """The ``.nemo`` of the base that a user has named, for what reads and checks it itself; see ``find``."""
    return find(named, field, lambda *_: ModelConfig()).file()
