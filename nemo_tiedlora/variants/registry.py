"""The methods by name: the only list of them. A new one is a file of its own and a line here.

docs/adding-a-method.md shows one. A method of somebody's own comes in by the entry point ``nemo_tiedlora.methods`` of
an installed package, or by ``--methods FILE.py`` on the command line; never by what a config, an adapter or a
checkpoint says.
"""

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field, fields
from importlib.metadata import entry_points
from typing import Any

from nemo_tiedlora.errors import UsageError, check_choice, closest
from nemo_tiedlora.variants.base import Site, Variant, Wrapper
from nemo_tiedlora.variants.conditional import Conditional, ConditionalConfig
from nemo_tiedlora.variants.config import VariantConfig
from nemo_tiedlora.variants.dora import Dora
from nemo_tiedlora.variants.dynamic import Dynamic, DynamicConfig
from nemo_tiedlora.variants.shared import Shared, SharedConfig
from nemo_tiedlora.variants.tied import Tied, TiedConfig
from nemo_tiedlora.variants.uni import Uni, UniConfig
from nemo_tiedlora.variants.xs import XS, XSConfig

#: Installed packages name modules under it that register methods.
ENTRY_POINTS = "nemo_tiedlora.methods"
#: What to do about a method that is not known.
OF_YOUR_OWN = "a method of your own is loaded by --methods FILE.py, or by installing the package that has it"


@dataclass(frozen=True)
class Method:
    """A way of making factors, by name.

    Args:
        scheme: its name, as in ``model.peft.peft_scheme``; its settings are ``model.peft.<scheme>_tuning``.
        config: the dataclass of its settings.
        variant: the class of its sources of factors.
        summary: one line, for people.
        defaults: settings that start from another value than the dataclass says.
        version: of what its settings and tensors mean. Adapter files record it; another one is refused.
        inner_only: NeMo has a scheme of this name; here it only names what DynaLoRA goes over.
    """

    scheme: str
    config: type[VariantConfig]
    variant: type[Variant]
    summary: str
    defaults: Mapping[str, Any] = field(default_factory=dict)
    version: int = 1
    inner_only: bool = False

    def settings(self) -> dict[str, Any]:
        """Every setting with its default: the section that Hydra's configs have for the method."""
        return {**self.config.defaults(), **self.defaults}


class Methods(Mapping[str, Method]):
    """Every method that is known, those of installed packages included, by the name of its scheme."""

    def __init__(self, *methods: Method):
        self._known: dict[str, Method] = {}
        self._asked_packages = False
        for method in methods:
            self.add(method)

    def add(self, method: Method) -> None:
        """Make a method known.

        Raises:
            UsageError: there is one of this name, or the name cannot be part of a setting's.
        """
        if method.scheme in self._known or method.scheme in STOCK:
            raise UsageError("scheme", method.scheme, "there is a method of this name already")
        if not method.scheme.isidentifier():
            raise UsageError("scheme", method.scheme, "must be a name such as my_lora")
        self._known[method.scheme] = method

    def _load_packages(self) -> None:
        if self._asked_packages:
            return
        self._asked_packages = True
        for found in entry_points(group=ENTRY_POINTS):
            try:
                found.load()
            except Exception as error:  # somebody else's code: the other methods still work
                from nemo_tiedlora.console import note

                reason = " ".join(str(error).split())
                note(f"the methods of {found.value} could not be loaded: {type(error).__name__}: {reason}")

    def __getitem__(self, scheme: str) -> Method:
        self._load_packages()
        return self._known[scheme]

    def __iter__(self) -> Iterator[str]:
        self._load_packages()
        return iter([scheme for scheme, method in self._known.items() if not method.inner_only])

    def __len__(self) -> int:
        return len(list(iter(self)))

    def __contains__(self, scheme: object) -> bool:
        return scheme in list(self)

    def inner(self) -> dict[str, Method]:
        """What DynaLoRA can go over."""
        self._load_packages()
        return {scheme: method for scheme, method in self._known.items() if method.config is not DynamicConfig}

    def of(self, scheme: str, field_name: str = "peft_scheme") -> Method:
        """The method of this name.

        Raises:
            UsageError: there is none.
        """
        if scheme not in self:
            raise UsageError(field_name, scheme, f"{closest(scheme, self)}; {OF_YOUR_OWN}")
        return self[scheme]


#: Schemes of NeMo's own; their names are taken.
STOCK = ("adapter", "ia3", "none", "parallel_adapter", "ptuning", "selective")

METHODS = Methods(
    Method("tied_lora", TiedConfig, Tied, "one pair of factors shared by all layers, scaled per layer"),
    Method("vera", TiedConfig, Tied, "tied_lora with preset VeRA: only the scales are trained", {"preset": "VeRA"}),
    Method("lora", TiedConfig, Tied, "a pair of factors per layer", {"preset": "LoRA"}, inner_only=True),
    Method("share_lora", SharedConfig, Shared, "one pair of factors per group of similar layers"),
    Method("cond_lora", ConditionalConfig, Conditional, "factors computed from the frozen weight"),
    Method("lora_xs", XSConfig, XS, "a trained rank × rank matrix between the frozen weight's singular vectors"),
    Method("uni_lora", UniConfig, Uni, "all values of all factors are those of one trained vector"),
    Method("dyna_lora", DynamicConfig, Dynamic, "any other method, of whose modules only some train at a time"),
)


def config_for(scheme: str, settings: dict[str, Any]) -> VariantConfig:
    """A scheme's config from a plain mapping, e.g. a YAML section.

    Raises:
        UsageError: unknown scheme or field (with the closest name), a value that the config refuses, or a combination
            that makes no sense.
    """
    config = _config(METHODS.of(scheme), settings)
    if isinstance(config, DynamicConfig):
        inner_config(config)
    return config


def inner_config(config: DynamicConfig) -> VariantConfig:
    """The config of the method that DynaLoRA is put over."""
    if config.inner == config.scheme:
        raise UsageError("inner", config.inner, "its modules take turns already; name another method")
    inner = METHODS.inner()
    check_choice("inner", config.inner, inner)
    if not inner[config.inner].variant.takes_turns:
        raise UsageError("inner", config.inner, "all its modules are one tensor, so none can wait; name another method")
    try:
        return _config(inner[config.inner], config.inner_settings())
    except UsageError as error:
        raise (error.under("settings") if error.field in config.settings else error) from None


def _config(method: Method, settings: dict[str, Any]) -> VariantConfig:
    known = {item.name for item in fields(method.config)} - {"scheme"}
    for name in settings:
        if name not in known:
            raise UsageError(name, settings[name], f"unknown setting; {closest(name, sorted(known))}")
    return method.config(scheme=method.scheme, **{**method.defaults, **settings})


def build(config: VariantConfig, layers: int) -> Variant:
    """The source of factors that ``config`` describes, for a model of ``layers`` layers.

    Raises:
        UsageError: a combination that makes no sense.
    """
    method = METHODS.inner().get(config.scheme) or METHODS.of(config.scheme)
    if isinstance(config, DynamicConfig) and issubclass(method.variant, Wrapper):
        return method.variant(config, build(inner_config(config), layers))
    variant = method.variant(config, layers)
    if config.lr_ratio != 1:
        _check_ratio(variant, config)
    return Dora(config, variant) if config.dora else variant


def _check_ratio(variant: Variant, config: VariantConfig) -> None:
    """LoRA+ tells the tensors of A from those of B."""
    trained = [spec for spec in variant.tensors(Site("", 0, 1, 1)).values() if spec.trained]
    parts = {"A": ("A", "u"), "B": ("B",)}
    factors = {factor: {spec.key for spec in trained if spec.factor in parts[factor]} for factor in parts}
    if factors["A"] & factors["B"]:
        raise UsageError("lr_ratio", config.lr_ratio, "nothing to tell apart: A and B are of one tensor; set it to 1")
    if not (factors["A"] and factors["B"]):
        only = " and ".join(factor for factor in "AB" if factors[factor])
        raise UsageError("lr_ratio", config.lr_ratio, f"nothing to tell apart: only {only} is trained; set it to 1")
