"""The methods by name. A new one is a file of its own and a line here: docs/adding-a-method.md shows one."""

from dataclasses import fields
from typing import Any

from nemo_tiedlora.errors import UsageError, check_choice, closest
from nemo_tiedlora.variants.base import Site, Variant
from nemo_tiedlora.variants.conditional import Conditional, ConditionalConfig
from nemo_tiedlora.variants.config import VariantConfig
from nemo_tiedlora.variants.dora import Dora
from nemo_tiedlora.variants.dynamic import Dynamic, DynamicConfig
from nemo_tiedlora.variants.shared import Shared, SharedConfig
from nemo_tiedlora.variants.tied import Tied, TiedConfig

#: Scheme name → its config class, the settings it starts from, and its variant.
SCHEMES: dict[str, tuple[type[VariantConfig], dict[str, Any], type[Variant]]] = {
    "tied_lora": (TiedConfig, {}, Tied),
    "vera": (TiedConfig, {"preset": "VeRA"}, Tied),
    "share_lora": (SharedConfig, {}, Shared),
    "cond_lora": (ConditionalConfig, {}, Conditional),
    "dyna_lora": (DynamicConfig, {}, Dynamic),
}


def config_for(scheme: str, settings: dict[str, Any]) -> VariantConfig:
    """A scheme's config from a plain mapping, e.g. a YAML section.

    Raises:
        UsageError: unknown scheme or field (with the closest name), a value that the config refuses, or a combination
            that makes no sense.
    """
    if scheme not in SCHEMES:
        raise UsageError("peft_scheme", scheme, closest(scheme, SCHEMES))
    config = _config(SCHEMES, scheme, settings)
    if isinstance(config, DynamicConfig):
        inner_config(config)
    return config


def inner_config(config: DynamicConfig) -> VariantConfig:
    """The config of the method that DynaLoRA is put over."""
    if config.inner == "dyna_lora":
        raise UsageError("inner", config.inner, "its modules take turns already; name another method")
    # NeMo has a scheme called lora; here it is plain LoRA, as everywhere in this package.
    inner = {"lora": (TiedConfig, {"preset": "LoRA"}, Tied)} | SCHEMES
    check_choice("inner", config.inner, inner)
    try:
        return _config(inner, config.inner, config.inner_settings())
    except UsageError as error:
        raise (error.under("settings") if error.field in config.settings else error) from None


def _config(schemes: dict, scheme: str, settings: dict[str, Any]) -> VariantConfig:
    config_class, defaults, _ = schemes[scheme]
    known = {item.name for item in fields(config_class)}
    for name in settings:
        if name not in known:
            raise UsageError(name, settings[name], f"unknown setting; {closest(name, sorted(known))}")
    return config_class(**(defaults | settings))


def build(config: VariantConfig, layers: int) -> Variant:
    """The source of factors that ``config`` describes, for a model of ``layers`` layers.

    Raises:
        UsageError: a combination that makes no sense.
    """
    if isinstance(config, DynamicConfig):
        return Dynamic(config, build(inner_config(config), layers))
    variant_class = next(variant for config_class, _, variant in SCHEMES.values() if type(config) is config_class)
    variant = variant_class(config, layers)
    if config.lr_ratio != 1:
        factors = {spec.factor for spec in variant.tensors(Site("", 0, 1, 1)).values() if spec.trained}
        if not {"A", "B"} <= factors:
            only = " and ".join(sorted(factors - {""}))
            raise UsageError("lr_ratio", config.lr_ratio, f"nothing to tell apart: only {only} is trained; set it to 1")
    return Dora(config, variant) if config.dora else variant
