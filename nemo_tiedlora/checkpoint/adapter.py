"""One adapter as a value: what it is, what it was trained on, and its tensors, whole and unsharded."""

from collections.abc import Iterable, Mapping
from dataclasses import asdict, dataclass, field
from functools import cached_property
from importlib import metadata
from typing import Any

from torch import Tensor

from nemo_tiedlora.errors import UsageError
from nemo_tiedlora.model.config import MOST_LAYERS, MOST_SIZE
from nemo_tiedlora.model.data import ModelConfig
from nemo_tiedlora.model.sizes import sites
from nemo_tiedlora.model.targets import KINDS, OPTIONAL_FIELDS, SHAPE_FIELDS, where
from nemo_tiedlora.variants import METHODS, Site, TensorSpec, Variant, VariantConfig, build, config_for
from nemo_tiedlora.variants.frozen import check

#: A model that NeMo does not run has no more kinds of linear layers.
MOST_KINDS = 4096
#: Packages whose versions a saved adapter records.
PACKAGES = ("nemo_tiedlora", "torch", "nemo_toolkit", "megatron-core")


def installed() -> dict[str, str]:
    """Versions of the packages that matter to an adapter, of those that are installed."""
    found = {}
    for name in PACKAGES:
        try:
            found[name] = metadata.version(name)
        except metadata.PackageNotFoundError:
            continue
    return found


@dataclass(frozen=True)
class Base:
    """The model that an adapter was trained on.

    Args:
        shape: the fields of its config that decide the adapter's tensors: ``SHAPE_FIELDS`` and ``activation``;
            those that are null are left out. Of a model that NeMo does not run: ``num_layers``, and under ``KINDS``
            the adapted linear layers, by kind: ``in``, ``out`` and the numbers of the ``layers``.
        checksums: SHA-256 of the weights of each adapted kind, by path; see ``checkpoint.base.checksums``. Empty:
            not recorded. Of a model that NeMo does not run, by kind.
    """

    shape: dict[str, Any]
    checksums: dict[str, str] = field(default_factory=dict)

    @classmethod
    def of(cls, model: ModelConfig, checksums: Mapping[str, str] | None = None) -> "Base":
        """From a NeMo GPT's model config."""
        shape = {name: model.get(name) for name in (*SHAPE_FIELDS, "activation")}
        return cls(_said(shape), dict(checksums or {}))

    @classmethod
    def of_sites(cls, sites: Iterable[Site], layers: int, checksums: Mapping[str, str]) -> "Base":
        """Of a model that NeMo does not run, from the adapted layers."""
        kinds: dict[str, Any] = {}
        for site in sites:
            kind = {"in": site.in_features, "out": site.out_features, "layers": []}
            kinds.setdefault(site.target, kind)["layers"].append(site.layer)
        return cls({"num_layers": layers, KINDS: kinds}, dict(checksums))


@dataclass(frozen=True)
class Blueprint:
    """A method with its settings, on a base: everything about an adapter but its numbers.

    Args:
        scheme: name of the method, a key of ``variants.METHODS``.
        settings: all of the method's settings, those that were decided later (groups, rank) included.
        base: what it is for.

    Reading any attribute raises ``UsageError`` if the method or the base's shape refuses the settings.
    """

    scheme: str
    settings: dict[str, Any]
    base: Base

    @cached_property
    def config(self) -> VariantConfig:
        """The method's settings, checked."""
        for section in (self.settings, self.settings.get("settings") or {}):
            if isinstance(section.get("groups"), str):  # the file of a stranger must not choose what is read
                raise UsageError("groups", section["groups"], "an adapter holds its groups as lists")
        return config_for(self.scheme, self.settings)

    @property
    def version(self) -> int:
        """Of the method, as it is installed here."""
        return METHODS.of(self.scheme, "method").version

    @cached_property
    def shape(self) -> ModelConfig:
        """The base's shape, as the fields of a NeMo model config."""
        return ModelConfig(self.base.shape)

    @cached_property
    def variant(self) -> Variant:
        """The source of factors, told of all layers."""
        _check_shape(self.base.shape)
        variant = build(self.config, self.shape.num_layers)
        variant.start(self.sites)
        return variant

    @cached_property
    def sites(self) -> list[Site]:
        """The adapted layers."""
        _check_shape(self.base.shape)
        for layer in self.config.layer_selection or ():
            if not 1 <= layer <= self.shape.num_layers:
                raise UsageError("layer_selection", layer, f"the base has layers 1 to {self.shape.num_layers}")
        return sites(self.config, self.shape)

    @cached_property
    def specs(self) -> dict[str, tuple[TensorSpec, Site]]:
        """Every tensor behind the factors by key, with the first layer that uses it."""
        return specs_of(self.variant, self.sites)

    @cached_property
    def paths(self) -> list[str]:
        """The adapted kinds of linear layer, by path below a transformer layer, sorted."""
        return paths_of(self.config, self.shape)

    @property
    def peft(self) -> dict[str, Any]:
        """Its settings as NeMo looks for them, under ``peft`` in a model's config."""
        return {"peft_scheme": self.scheme, f"{self.scheme}_tuning": self.settings}

    @cached_property
    def shapes(self) -> dict[str, tuple[int, ...]]:
        """The whole shape of every tensor, by key."""
        return {key: spec.shape(site, self.variant.rank) for key, (spec, site) in self.specs.items()}


@dataclass(frozen=True)
class Adapter(Blueprint):
    """A trained adapter.

    Args:
        tensors: whole tensors by logical key, e.g. ``attention_qkv.3.A``: all trained and computed ones; frozen random
            ones may be there too, and are drawn again from the seed if not.
        versions: of the packages that made it.
        model_config: the training model's NeMo config as YAML, for NeMo's scripts; only kept in ``.nemo`` files.

    Raises:
        UsageError: settings that the method or the base's shape refuses, or tensors that do not fit them, by name.
    """

    tensors: dict[str, Tensor]
    versions: dict[str, str] = field(default_factory=installed)
    model_config: str | None = None

    def __post_init__(self):
        for key, (spec, _) in self.specs.items():
            if spec.stored and key not in self.tensors:
                raise UsageError("adapter", self.scheme, f"the tensor {key} is missing")
        for key, tensor in self.tensors.items():
            if key not in self.shapes:
                raise UsageError("adapter", self.scheme, f"the tensor {key} is not one of its method's")
            if tuple(tensor.shape) != self.shapes[key]:
                shapes = f"has shape {tuple(tensor.shape)}; its settings say {self.shapes[key]}"
                raise UsageError("adapter", self.scheme, f"the tensor {key} {shapes}")
            if not tensor.is_floating_point():
                raise UsageError("adapter", self.scheme, f"the tensor {key} is of type {tensor.dtype}")

    def drawn(self) -> dict[str, Tensor]:
        """The frozen random tensors by key, in float32 or int32: drawn again from the seed where they are not stored.

        Raises:
            UsageError: one is not what the adapter was trained against.
        """
        expected, variant = self.config.checksums or {}, self.variant
        tensors = {}
        for key, (spec, _) in self.specs.items():
            if spec.stored:
                continue
            if key in self.tensors:
                tensors[key] = self.tensors[key].float()
                continue
            shape = self.shapes[key]
            tensors[key] = spec.init.draw(shape, variant.seed, key, variant.drawing_rule)
            if key in expected:
                unit = spec.init.unit(shape)
                check(key, tensors[key], unit, expected[key], variant.drawing_rule, variant.seed)
        return tensors


def specs_of(variant: Variant, adapted: list[Site]) -> dict[str, tuple[TensorSpec, Site]]:
    """Every tensor behind the factors of the adapted layers, by key, with the first layer that uses it."""
    found: dict[str, tuple[TensorSpec, Site]] = {}
    for site in adapted:
        variant.check(site)
        for spec in variant.tensors(site).values():
            found.setdefault(spec.key, (spec, site))
    return found


def paths_of(config: VariantConfig, model: ModelConfig) -> list[str]:
    """The kinds of linear layer that a config adapts in a model, by path below a transformer layer, sorted."""
    return sorted({where(site.target).path for site in sites(config, model)})


def settings_of(config: VariantConfig, variant: Variant, checksums: dict[str, str]) -> dict[str, Any]:
    """All settings of a method as plain data, with what was decided, the checksums of frozen tensors and the rule they
    were drawn by; those that are null are left out, and ``store_frozen`` where there is nothing it says."""
    left_out = {"scheme": None, "store_frozen": config.store_frozen or None}
    return _said(asdict(config) | left_out | {"checksums": checksums or None} | variant.decided())


def _said(values: dict[str, Any]) -> dict[str, Any]:
    return {name: value for name, value in values.items() if value is not None}


def _is_size(size: object, most: int) -> bool:
    return type(size) is int and 1 <= size <= most


def _check_shape(shape: dict[str, Any]) -> None:
    if KINDS in shape:
        _check_kinds(shape[KINDS], shape.get("num_layers"))
        return
    for name in SHAPE_FIELDS:
        size = shape.get(name)
        if size is None and name in OPTIONAL_FIELDS:
            continue
        if not _is_size(size, MOST_LAYERS if name == "num_layers" else MOST_SIZE):
            raise UsageError(f"base.{name}", size, "not a size that a model can have")
    if shape["num_attention_heads"] % (shape.get("num_query_groups") or 1):
        raise UsageError("base.num_query_groups", shape["num_query_groups"], "does not divide the attention heads")


def _check_kinds(kinds: Any, layers: Any) -> None:
    if not _is_size(layers, MOST_LAYERS):
        raise UsageError("base.num_layers", layers, "not a size that a model can have")
    if not isinstance(kinds, dict) or not 1 <= len(kinds) <= MOST_KINDS:
        raise UsageError(f"base.{KINDS}", "…", "not kinds of linear layers by name")
    for name, kind in kinds.items():
        fits = isinstance(kind, dict) and kind.keys() == {"in", "out", "layers"}
        numbers = kind["layers"] if fits else None
        fits = fits and _is_size(kind["in"], MOST_SIZE) and _is_size(kind["out"], MOST_SIZE)
        fits = fits and isinstance(numbers, list) and all(type(n) is int and 0 <= n < layers for n in numbers)
        if not fits or not numbers or len(set(numbers)) < len(numbers):
            raise UsageError(f"base.{KINDS}.{name}", kind, "not the sizes and the layers of a kind")
