"""The folder of a model for transformers, whatever a user calls it."""

from pathlib import Path

from nemo_tiedlora.errors import UsageError, closest
from nemo_tiedlora.huggingface import minilm, smollm2
from nemo_tiedlora.huggingface.families import CONFIG

#: Real models that are called by a name, which no folder can take: write ``./minilm`` for one.
NAMED = {smollm2.NAME: smollm2.folder, minilm.NAME: minilm.folder}


def folder_of(named: str | Path, field: str = "model") -> Path:
    """The folder for ``from_pretrained`` of the model that a user has named; one with a name is fetched once.

    Args:
        named: such a folder, or one of ``NAMED``: ``smollm2`` (a decoder), ``minilm`` (an encoder).
        field: under which they named it.

    Raises:
        UsageError: there is none of that name, or it cannot be fetched.
    """
    if named in NAMED:
        try:
            return NAMED[str(named)]()
        except UsageError as error:
            raise UsageError(field, named, error.way_out) if error.field == "base" else error from None
    path = Path(named)
    if not path.is_dir():
        raise UsageError(field, str(named), f"no such folder, and no model's name: {closest(named, NAMED)}")
    if not (path / CONFIG).is_file():
        raise UsageError(field, str(named), f"no model of transformers: there is no {CONFIG} in it")
    return path
