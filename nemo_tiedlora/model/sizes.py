"""How large an adapter is, from shapes alone."""

from dataclasses import dataclass

from nemo_tiedlora.model.data import ModelConfig
from nemo_tiedlora.model.targets import KINDS, kinds, shape, where
from nemo_tiedlora.variants import Site, TiedConfig, Variant, VariantConfig, build, count

BYTES_PER_PARAMETER = 4


@dataclass(frozen=True)
class Sizes:
    """Sizes of one adapter.

    Args:
        trainable: parameters that are trained.
        active: those that get gradients in one step, on average: fewer under DynaLoRA; null where it cannot be said.
        stored: parameters in a saved adapter; without ``store_frozen``, frozen random ones are drawn again.
        total: trainable and frozen ones.
        percent_of_lora: share of the trainable parameters of plain LoRA on the same targets and layers, rank included.
        bytes: of the stored parameters in float32.
        rank: the rank used, which rank expansion may have raised.
    """

    trainable: int
    active: int | None
    stored: int
    total: int
    percent_of_lora: float
    bytes: int
    rank: int


def sites(config: VariantConfig, model: ModelConfig) -> list[Site]:
    """The layers that ``config`` adapts in a model of this NeMo config; or all those that there are by kind.

    Raises:
        UsageError: targets that the model does not have.
    """
    if own := model.get(KINDS):
        return [Site(name, layer, kind["in"], kind["out"]) for name, kind in own.items() for layer in kind["layers"]]
    layers = config.adapted_layers(model.num_layers)
    return [
        Site(kind, layer, *shape(kind, model), routed=where(kind).expert is not None)
        for kind in kinds(config.target_modules, model)
        for layer in layers
    ]


def check_fit(config: VariantConfig, model: ModelConfig) -> Variant:
    """The method that ``config`` sets up, once it is known to fit every layer it adapts."""
    variant = build(config, model.num_layers)
    adapted = sites(config, model)
    for site in adapted:
        variant.check(site)
    variant.start(adapted)
    return variant


def lora_size(config: VariantConfig, model: ModelConfig) -> int:
    """Trainable parameters of plain LoRA with the same rank, targets and layers."""
    same = {name: getattr(config, name) for name in ("rank", "target_modules", "layer_selection")}
    return count(build(TiedConfig(preset="LoRA", **same), model.num_layers), sites(config, model)).trainable


def sizes(config: VariantConfig, model: ModelConfig) -> Sizes:
    """Count an adapter's parameters without building it.

    Raises:
        UsageError: settings that do not fit the model.
    """
    variant = check_fit(config, model)
    counted = count(variant, sites(config, model))
    stored = counted.trainable + counted.computed + (counted.frozen if config.store_frozen else 0)
    return Sizes(
        trainable=counted.trainable,
        active=variant.trained_at_once(sites(config, model)),
        stored=stored,
        total=sum(counted),
        percent_of_lora=round(100 * counted.trainable / lora_size(config, model), 2),
        bytes=BYTES_PER_PARAMETER * stored,
        rank=variant.rank,
    )
