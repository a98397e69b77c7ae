"""The methods by name. A new one is a file of its own and a line here."""

from dataclasses import fields
from typing import Any

from nemo_tiedlora.errors import UsageError, closest
from nemo_tiedlora.variants.base import Variant
from nemo_tiedlora.variants.conditional import Conditional, ConditionalConfig
from nemo_tiedlora.variants.config import VariantConfig
from nemo_tiedlora.variants.shared import Shared, SharedConfig
from nemo_tiedlora.variants.tied import Tied, TiedConfig

#: Scheme name → its config class, the settings it starts from, and its variant.
SCHEMES: dict[str, tuple[type[VariantConfig], dict[str, Any], type[Variant]]] = {
    "tied_lora": (TiedConfig, {}, Tied),
    "vera": (TiedConfig, {"preset": "VeRA"}, Tied),
    "share_lora": (SharedConfig, {}, Shared),
    "cond_lora": (ConditionalConfig, {}, Conditional),
}

_VARIANTS = {config: variant for config, _, variant in SCHEMES.values()}


def config_for(scheme: str, settings: dict[str, Any]) -> VariantConfig:
    """A scheme's config from a plain mapping, e.g. a YAML section.

    Raises:
        UsageError: unknown scheme or field (with the closest name), or a value that the config refuses.
    """
    if scheme not in SCHEMES:
        raise UsageError("peft_scheme", scheme, closest(scheme, SCHEMES))
    config_class, defaults, _ = SCHEMES[scheme]
    known = {item.name for item in fields(config_class)}
    for name in settings:
        if name not in known:
            raise UsageError(name, settings[name], f"unknown setting; {closest(name, sorted(known))}")
    return config_class(**(defaults | settings))


def build(config: VariantConfig, layers: int) -> Variant:
    """The source of factors that ``config`` describes, for a model of ``layers`` layers."""
    return _VARIANTS[type(config)](config, layers)
