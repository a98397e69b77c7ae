"""Methods of Hugging Face PEFT by the names of its ``PeftType``: ``peft:lora``, ``peft:vera`` and so on."""

from collections.abc import Iterable
from dataclasses import fields
from typing import TYPE_CHECKING, Any

from benchmark_suite.variant_spec import PEFT, VariantSpec
from nemo_tiedlora.facade import UsageError, closest

if TYPE_CHECKING:
    from peft import PeftConfig

#: Fields of its configs that are not a method's settings.
NOT_SETTINGS = {
    "auto_mapping", "base_model_name_or_path", "inference_mode", "peft_type", "peft_version", "revision", "task_type",
}  # fmt: skip
#: Those that do more, or other, than to train tensors beside linear layers, and what.
REFUSED = {
    "adalora": "it changes ranks in the steps of a loop of its own",
    "adaption_prompt": "it puts prompts into attention",
    "cartridge": "it puts a cache of keys and values before the text",
    "ln_tuning": "it trains norms, which no target names",
    "mixed": "it is several methods",
    "multitask_prompt_tuning": "it puts tokens before the text",
    "poly": "it wants to know each row's task",
    "shadow": "it runs a model of its own beside the base",
    "trainable_tokens": "it trains embeddings",
    "xlora": "it mixes adapters that are trained already",
}


def known() -> dict[str, Any]:
    """The config class of every method by its name after ``peft:``.

    Raises:
        UsageError: PEFT is not installed.
    """
    try:
        from peft import PeftType
        from peft.mapping import PEFT_TYPE_TO_CONFIG_MAPPING
    except ImportError:
        raise UsageError("scheme", PEFT, "PEFT is not installed: pip install peft") from None
    return {
        name.lower(): PEFT_TYPE_TO_CONFIG_MAPPING[kind]
        for name, kind in PeftType.__members__.items()
        if kind in PEFT_TYPE_TO_CONFIG_MAPPING
    }


def check(variant: VariantSpec) -> None:
    """Raises ``UsageError`` for a method that is not there or not run here, and for settings that it does not take."""
    try:
        for rank in variant.ranks or (None,):
            config_of(variant, rank, ["linear"])
    except UsageError as error:
        raise error.under(variant.name) from None


def config_of(variant: VariantSpec, rank: int | None, targets: Iterable[str], task: str | None = None) -> "PeftConfig":
    """PEFT's config of a variant.

    Args:
        targets: names of modules. task: PEFT's ``TaskType``.

    Raises:
        UsageError: see ``check``.
    """
    name, classes = variant.scheme.removeprefix(PEFT), known()
    if name not in classes:
        there = [f"{PEFT}{each}" for each in sorted(classes) if each not in REFUSED and not is_prompt(classes[each])]
        raise UsageError("scheme", variant.scheme, closest(variant.scheme, there))
    if name in REFUSED or is_prompt(classes[name]):
        reason = REFUSED.get(name, "it puts tokens before the text")
        raise UsageError("scheme", variant.scheme, f"not run here: {reason}")
    settings = variant.settings_at(rank)
    valid = {item.name for item in fields(classes[name]) if item.init} - NOT_SETTINGS
    for setting in settings:
        if setting not in valid:
            raise UsageError(f"settings.{setting}", settings[setting], closest(setting, sorted(valid)))
    try:
        return classes[name](**settings | {"target_modules": list(targets)}, task_type=task)
    except (TypeError, ValueError, AttributeError) as error:
        raise UsageError("settings", settings, f"PEFT refuses them: {error}") from None


def is_prompt(config: Any) -> bool:
    """Whether a config class is of a method that puts tokens before the text."""
    from peft.config import PromptLearningConfig

    return issubclass(config, PromptLearningConfig)
