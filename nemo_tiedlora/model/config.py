"""``model_config.yaml`` of a ``.nemo``: read as plain data, and checked for what NeMo would run, open or allocate."""

from pathlib import Path
from typing import Any, cast

from nemo_tiedlora.errors import UsageError
from nemo_tiedlora.model.archive import Files, opened
from nemo_tiedlora.model.data import ModelConfig, load, yaml_reader
from nemo_tiedlora.model.targets import KINDS, OPTIONAL_FIELDS, SHAPE_FIELDS, is_gated

MODEL_CONFIG = "model_config.yaml"
#: More than any config has.
MOST_BYTES, MOST_NODES, MOST_DEPTH = 4 * 2**20, 50_000, 32
#: More than any model has; a file that declares more would only cost time and memory.
MOST_LAYERS, MOST_SIZE = 10_000, 2**24

#: The classes that ``target`` may name.
MODELS = (
    "nemo.collections.nlp.models.language_modeling.megatron_gpt_model.MegatronGPTModel",
    "nemo.collections.nlp.models.language_modeling.megatron_gpt_sft_model.MegatronGPTSFTModel",
)
#: Tokenizers whose files are data; NeMo unpickles those of others.
TOKENIZERS = ("sentencepiece", "huggingface", "megatron", "tiktoken", "byte-level")
#: Fields that decide how much memory a model takes.
SIZES = (*SHAPE_FIELDS, "encoder_seq_length", "max_position_embeddings", "make_vocab_size_divisible_by")
#: Names under which Hydra and NeMo look for what to call.
CALLED = ("_target_", "cls", "__target__")
NO_MAPPING = "not a list of settings with names"
#: NeMo's own schemes, of which parallel_adapter is made here; the key of their settings under peft.
STOCK_SCHEMES = {
    "lora": "lora_tuning",
    "adapter": "adapter_tuning",
    "parallel_adapter": "adapter_tuning",
    "ia3": "ia3_tuning",
    "ptuning": "p_tuning",
    "none": None,
}


def read_model_config(files: Files, whole: bool = False) -> ModelConfig:
    """The config among a model's or an adapter's files.

    Args:
        whole: it must have the sizes of a whole model.

    Raises:
        UsageError: it is damaged, not plain data, too large, or names what NeMo would run.
    """
    text = files.read(MODEL_CONFIG, MOST_BYTES)
    try:
        config = parse(text)
        check(config)
        if whole:
            check_base_config(config)
    except UsageError as error:
        raise files.error(f"its {MODEL_CONFIG}: {error.field}={error.value!r}: {error.way_out}") from None
    except ValueError as error:
        raise files.error(f"its {MODEL_CONFIG}: {error}") from None
    return config


def config_as_it_is(path: Path, field: str) -> ModelConfig:
    """The config of a file that the user trusts, as NeMo reads it: its fields may refer to each other."""
    from omegaconf import DictConfig, OmegaConf

    with opened(path, field) as files:
        config = OmegaConf.create(files.read(MODEL_CONFIG, files.sizes.get(MODEL_CONFIG, 0)).decode())
        if not isinstance(config, DictConfig):
            raise files.error(f"its {MODEL_CONFIG}: {NO_MAPPING}")
        return cast(ModelConfig, config)  # which is read in the same ways


def parse(text: bytes) -> ModelConfig:
    """YAML without tags, aliases and interpolations, as NeMo writes it.

    Raises:
        ValueError: something else.
    """
    yaml = yaml_reader()
    try:
        decoded = text.decode()
        _check_events(decoded)
        content = load(decoded)
    except ValueError as error:
        if type(error) is ValueError:
            raise
        raise ValueError(f"damaged ({type(error).__name__})") from None
    except (yaml.YAMLError, RecursionError, TypeError, AttributeError) as error:
        raise ValueError(f"damaged ({type(error).__name__})") from None
    if not isinstance(content, dict):
        raise ValueError(NO_MAPPING)
    for path, value in _walk(content):
        for text in (path.rsplit(".", 1)[-1], value):
            if isinstance(text, str) and "${" in text:
                raise ValueError(f"{path} refers to something else (${{…}}); NeMo writes out what it means")
    return ModelConfig(content)


def _check_events(text: str) -> None:
    yaml, depth = yaml_reader(), 0
    for number, event in enumerate(yaml.parse(text, Loader=getattr(yaml, "CSafeLoader", yaml.SafeLoader))):
        if isinstance(event, yaml.AliasEvent):
            raise ValueError(f"it uses an alias (*{event.anchor}), which NeMo does not write")
        if getattr(event, "tag", None) not in (None, "!"):
            raise ValueError(f"it uses a tag ({event.tag}), which NeMo does not write")
        depth += isinstance(event, yaml.CollectionStartEvent) - isinstance(event, yaml.CollectionEndEvent)
        if depth > MOST_DEPTH:
            raise ValueError(f"nested more than {MOST_DEPTH} deep")
        if number > MOST_NODES:
            raise ValueError(f"more than {MOST_NODES:,} entries")


def _walk(content: Any, path: str = "") -> Any:
    items = content.items() if isinstance(content, dict) else enumerate(content) if isinstance(content, list) else ()
    for name, value in items:
        if not isinstance(name, str | int | float):
            raise ValueError(f"damaged ({name!r} is no name)")
        below = f"{path}.{name}" if path else str(name)
        yield below, value
        yield from _walk(value, below)


def check(config: ModelConfig) -> None:
    """Raise ``UsageError`` for what NeMo would call, open or allocate because a file says so."""
    for path, value in _walk(config):
        if path.rsplit(".", 1)[-1] in CALLED:
            raise UsageError(path, value, "names something to be called, which a model's config must not")
    if "params" in config:
        raise UsageError("params", "…", "arguments of something to be called, which a model's config must not have")
    target = config.get("target")
    if target is not None and target not in MODELS:
        raise UsageError("target", target, f"must be {' or '.join(MODELS)}")
    for name in SIZES:
        value = config.get(name)
        most = MOST_LAYERS if name == "num_layers" else MOST_SIZE
        if value is not None and (type(value) is not int or not 1 <= value <= most):
            raise UsageError(name, value, f"not a size that a model can have: a whole number from 1 to {most:,}")
    for name in ("peft", "tokenizer", "data", "optim"):
        if not isinstance(config.get(name) or {}, dict):
            raise UsageError(name, config[name], "a section, not a single value")
    tokenizer = config.get("tokenizer") or {}
    if tokenizer.get("library") not in (None, *TOKENIZERS):
        raise UsageError("tokenizer.library", tokenizer["library"], f"must be one of {', '.join(TOKENIZERS)}")
    if tokenizer.get("trust_remote_code"):
        raise UsageError(
            "tokenizer.trust_remote_code", tokenizer["trust_remote_code"], "would run the tokenizer's code"
        )
    if (config.get("memory_profile") or {}).get("enabled"):
        raise UsageError("memory_profile.enabled", True, "would write files where the model's config says")


def check_base_config(config: ModelConfig) -> None:
    """Raise ``UsageError`` unless ``config`` has the sizes of a whole model."""
    for name in SHAPE_FIELDS:
        if config.get(name) is None and name not in OPTIONAL_FIELDS:
            raise UsageError(name, None, "not a model's config without it")
    if config.num_attention_heads % (config.get("num_query_groups") or 1):
        raise UsageError("num_query_groups", config.num_query_groups, "does not divide the attention heads")


def nemo_config(path: str | Path, field: str) -> ModelConfig:
    """The model config of a base ``.nemo``, without a look at the rest; what loads it calls ``check_base`` first."""
    with opened(Path(path), field) as archive:
        return read_model_config(archive, whole=True)


def not_of_nemos(field: str, path: str | Path) -> UsageError:
    """What to say of an adapter that is for a model that NeMo does not run."""
    way_out = "made for a model of another kind than NeMo runs; nemo_tiedlora.huggingface.load puts it onto that model"
    return UsageError(field, str(path), way_out)


def check_shape(saved: ModelConfig, base: ModelConfig, field: str, path: str | Path) -> None:
    """Raise ``UsageError`` unless an adapter's base had the shape of ``base``."""
    if KINDS in saved:
        raise not_of_nemos(field, path)
    there, here = _shape(saved), _shape(base)
    for name, value in there.items():
        if value != here[name]:
            raise UsageError(field, str(path), f"made for another base: {name} was {value}, here it is {here[name]}")
    if is_gated(saved) != is_gated(base):
        raise UsageError(field, str(path), f"made for another base: its activation was {saved.get('activation')}")


def _shape(config: ModelConfig) -> dict[str, Any]:
    """The fields that decide it, with what NeMo takes where they say nothing."""
    found = {name: config.get(name) for name in SHAPE_FIELDS}
    heads = found["num_attention_heads"]
    found["num_query_groups"] = found["num_query_groups"] or heads
    found["kv_channels"] = found["kv_channels"] or (heads and (found["hidden_size"] or 0) // heads)
    return found
