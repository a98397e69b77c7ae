"""The config saved with an adapter, whatever its form, once all of the adapter is known to be sound."""

from pathlib import Path

from nemo_tiedlora.checkpoint.legacy import open_adapter
from nemo_tiedlora.checkpoint.pickles import is_trusted, with_digest
from nemo_tiedlora.checkpoint.store import is_canonical, read
from nemo_tiedlora.errors import UsageError
from nemo_tiedlora.model.config import check_shape, config_as_it_is, parse
from nemo_tiedlora.model.data import ModelConfig, over


def saved_config(path: str | Path, field: str) -> ModelConfig:
    """The model config saved with an adapter, in the canonical form or in NeMo's; all of the adapter is checked."""
    path = Path(path)
    if not is_canonical(path, field):
        if is_trusted(path):
            return config_as_it_is(path, field)
        try:
            return open_adapter(path, field)[0]
        except UsageError as error:
            raise with_digest(error, path) from None
    adapter = read(path, field)
    own = parse(adapter.model_config.encode()) if adapter.model_config else {"mcore_gpt": True}
    return over(own, {**adapter.base.shape, "peft": adapter.peft})


def check_adapter(path: str | Path, base: ModelConfig, field: str, scheme: str | None = None) -> ModelConfig:
    """The config saved with an adapter, once it is known to fit ``base`` (and ``scheme``, if given)."""
    saved = saved_config(path, field)
    trained = (saved.get("peft") or {}).get("peft_scheme")
    if not trained or trained == "none":
        raise UsageError(field, str(path), "a whole model, not an adapter")
    if scheme not in (None, trained):
        raise UsageError(field, str(path), f"an adapter of scheme {trained}; set model.peft.peft_scheme={trained}")
    check_shape(saved, base, field, path)
    return saved
