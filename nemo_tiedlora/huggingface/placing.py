"""Where an adapter goes on a transformers model: the linear layers that targets name, and the sites they are."""

from __future__ import annotations

import re
from collections.abc import Sequence
from fnmatch import fnmatchcase
from typing import TYPE_CHECKING, Any, NamedTuple

from omegaconf import DictConfig, OmegaConf

from nemo_tiedlora.attach.placed import Place, Span, sizes
from nemo_tiedlora.errors import UsageError, closest
from nemo_tiedlora.huggingface.families import FAMILIES, model_config
from nemo_tiedlora.model.targets import NAMES, TARGETS, expand, places, shape, whole
from nemo_tiedlora.variants import Site, VariantConfig

if TYPE_CHECKING:
    from torch import nn

    from nemo_tiedlora.huggingface.modules import Module, Modules

ALL = "all-linear"
#: What transformers calls the last layers of models for a task.
HEADS = ("classifier", "pre_classifier", "score", "qa_outputs", "classification_head", "logits_proj", "regressor")


class Known(NamedTuple):
    """A model of a family that NeMo runs too.

    Args:
        shape: its config in NeMo's words.
    """

    modules: Modules
    shape: DictConfig


class Found(NamedTuple):
    """What targets mean on a model.

    Args:
        targets: the sites' kinds. layers: number of layers in the model.
        known: None: of no such family; kinds are paths of modules without their numbers.
    """

    targets: list[str]
    places: list[Place]
    layers: int
    known: Known | None


def known(model: nn.Module) -> Known | None:
    """What is known of a model of ``FAMILIES``; None of any other.

    Raises:
        UsageError: it is of one, with a setting that makes another model of it.
    """
    name = type(model).__name__
    if name not in FAMILIES or not type(model).__module__.startswith("transformers."):
        return None
    found = model_config({**model.config.to_dict(), "architectures": [name]})  # type: ignore[operator, union-attr]
    return Known(FAMILIES[name].modules, OmegaConf.create(found))


def found(model: nn.Module, targets: Sequence[str] | str, config: VariantConfig) -> Found:
    """The sites that ``targets`` name.

    Args:
        targets: names of modules, whole or their ends, with ``*`` and ``?``; regular expressions of whole names;
            ``all-linear``; on the families that NeMo runs, also NeMo's words, such as ``attention_qkv``.

    Raises:
        UsageError: a target that no linear layer has, or one for which this model has another layout.
    """
    targets = [targets] if isinstance(targets, str) else targets
    if not isinstance(targets, list | tuple) or not targets or not all(isinstance(name, str) for name in targets):
        raise UsageError("targets", targets, f"write a list of names, such as ['q_proj'], or '{ALL}'")
    linear = _linear(model)
    words = [target for target in targets if target in TARGETS or target in NAMES]
    try:
        family = known(model)
    except UsageError:
        if words:
            raise
        family = None  # by the names of its modules, any model will do
    if family:
        return _in_family(model, family, targets, linear, config)
    if words:
        kinds = "; ".join(FAMILIES)
        raise UsageError("targets", words[0], f"a word for {kinds}; here, {_names(words[0], linear)}")
    return _by_name(model, targets, linear, config)


def _runs(module: Any) -> bool:
    """torch's own attention reads its output layer's weight instead of running the layer."""
    return type(module).__name__ != "NonDynamicallyQuantizableLinear"


def _names(target: str, linear: dict[str, Any]) -> str:
    """What there is instead of ``target``."""
    last = {name.rpartition(".")[2]: None for name in linear}
    return f"{closest(target, last)}" if last else "there is no linear layer in it"


def matching(target: str, linear: dict[str, Any]) -> list[str]:
    """The names of linear layers that a target stands for.

    Raises:
        UsageError: there are none.
    """
    if target == ALL:
        return list(linear)
    names = [name for name in linear if fnmatchcase(f".{name}", f"*.{target}")]
    if not names:
        try:
            names = [name for name in linear if re.fullmatch(target, name)]
        except re.error:
            names = []
    if not names:
        raise UsageError("targets", target, f"no linear layer has this name; {_names(target, linear)}")
    return names


def _in_family(
    model: nn.Module, family: Known, targets: Sequence[str], linear: dict[str, Any], config: VariantConfig
) -> Found:
    inside = {
        f"{family.modules.layers}.{layer}.{module.name}": module
        for layer in range(family.shape.num_layers)
        for module in family.modules.linear
    }
    here = {name: linear[name] for name in inside if name in linear}
    kinds: list[str] = []
    for target in targets:
        for kind in [target] if target in TARGETS or target in NAMES else _kinds(target, here, inside, family):
            if kind not in kinds:
                kinds.append(kind)
    try:
        kinds = expand(kinds)
    except UsageError as error:
        raise UsageError("targets", error.value, error.way_out) from None
    adapted = config.adapted_layers(family.shape.num_layers)
    for layer in adapted:
        if not 0 <= layer < family.shape.num_layers:
            raise UsageError("layer_selection", layer + 1, f"the model has layers 1 to {family.shape.num_layers}")
    sites = [Site(kind, layer, *shape(kind, family.shape)) for kind in kinds for layer in adapted]
    return Found(kinds, [place(model, site, family) for site in sites], family.shape.num_layers, family)


def _kinds(target: str, here: dict[str, Any], inside: dict[str, Module], family: Known) -> list[str]:
    """NeMo's words for the linear layers that have a name."""
    layers: dict[str, int] = {}
    for name in matching(target, here):
        parts = inside[name].parts
        kind = parts[0] if len(parts) == 1 else whole(TARGETS[parts[0]].path)
        layers[kind] = layers.get(kind, 0) + 1
    for number in layers.values():
        if number < family.shape.num_layers:
            way_out = f"names {number} of {family.shape.num_layers} layers; name all and choose with layer_selection"
            raise UsageError("targets", target, way_out)
    return list(layers)


def place(model: nn.Module, site: Site, family: Known) -> Place:
    """A site of NeMo's on the modules that have its rows."""
    import torch

    own = places((site.target,), family.shape)
    path = TARGETS[site.target].path
    number = torch.full((shape(whole(path), family.shape)[1],), -1)  # of each row of the whole weight, in the site
    number[own] = torch.arange(len(own))
    spans = []
    for module in family.modules.linear:
        if TARGETS[module.parts[0]].path != path:
            continue
        rows = number[places(module.parts, family.shape)]
        inside = (rows >= 0).nonzero()[:, 0]
        if not len(inside):
            continue
        name = f"{family.modules.layers}.{site.layer}.{module.name}"
        linear = model.get_submodule(name)
        if len(inside) == len(rows) == site.out_features and torch.equal(rows, torch.arange(len(rows))):
            spans.append(Span(name, linear))
        else:
            spans.append(Span(name, linear, inside if len(inside) < len(rows) else None, rows[inside]))
    return Place(site, tuple(spans))


def _by_name(model: nn.Module, targets: Sequence[str], linear: dict[str, Any], config: VariantConfig) -> Found:
    wanted = {name for target in targets for name in matching(target, linear)}
    if ALL in targets:  # heads and poolers are in no layer
        wanted = {name for name in wanted if _numbers(name)} or wanted
    _check_own(model, wanted, linear)
    everything = by_kind(linear)
    layers = 1 + max(everything[name].site.layer for name in wanted)
    for layer in config.layer_selection or ():
        if not 1 <= layer <= layers:
            raise UsageError("layer_selection", layer, f"the model has layers 1 to {layers}")
    adapted = config.adapted_layers(layers)
    found = [one for name, one in everything.items() if name in wanted and one.site.layer in adapted]
    if not found:
        raise UsageError("layer_selection", config.layer_selection, "none of the targets is in these layers")
    return Found(list(dict.fromkeys(one.site.target for one in found)), found, layers, None)


def _check_own(model: nn.Module, wanted: set[str], linear: dict[str, Any]) -> None:
    """A weight that is an embedding's too cannot be adapted in one place: merging would change the other."""
    names: dict[int, list[str]] = {}
    for name, parameter in model.named_parameters(remove_duplicate=False):
        names.setdefault(id(parameter), []).append(name)
    for name in sorted(wanted):
        others = [other for other in names[id(linear[name].weight)] if other != f"{name}.weight"]
        if others:
            raise UsageError(
                "targets", name, f"its weight is also {others[0]}, which merging would change; leave it out"
            )


def by_kind(linear: dict[str, Any]) -> dict[str, Place]:
    """Every linear layer's site by the layer's name: its kind is its path without numbers, and if other shapes have
    that too, its shape: they could not share tensors."""
    groups: dict[str, dict[tuple[int, int], list[str]]] = {}
    for name, module in linear.items():
        path = ".".join(part for part in name.split(".") if not part.isdecimal())
        groups.setdefault(path, {}).setdefault(sizes(module) or (0, 0), []).append(name)
    found = {}
    for path, shapes in groups.items():
        for (columns, rows), names in shapes.items():
            target = path if len(shapes) == 1 else f"{path} {rows}x{columns}"
            for layer, name in zip(_layers(names), names, strict=True):
                found[name] = Place(Site(target, layer, columns, rows), (Span(name, linear[name]),))
    return {name: found[name] for name in linear}


def _numbers(name: str) -> list[int]:
    return [int(part) for part in name.split(".") if part.isdecimal()]


def _layers(names: list[str]) -> list[int]:
    """The number of each name's layer: the one in its path that tells them apart, or else their order."""
    numbers = [_numbers(name) for name in names]
    if len(names) == 1:
        return [numbers[0][0] if numbers[0] else 0]
    differ = [place for place in range(len(numbers[0])) if len({found[place] for found in numbers}) > 1]
    return [found[differ[0]] for found in numbers] if len(differ) == 1 else list(range(len(names)))


def again(model: nn.Module, sites: Sequence[Site], targets: list[str], layers: int) -> Found:
    """The layers of a model of no family of NeMo's that are ``sites``.

    Raises:
        UsageError: it has not all of them.
    """
    here = {one.site: one for one in by_kind(_linear(model)).values()}
    for site in sites:
        if site not in here:
            what = f"layer {site.layer} of {site.target} ({site.out_features} x {site.in_features})"
            raise UsageError("model", type(model).__name__, f"has not {what}, which the adapter is for")
    return Found(targets, [here[site] for site in sites], layers, None)


def _linear(model: nn.Module) -> dict[str, Any]:
    """All linear layers by name, but those in heads, which are trained whole."""
    heads = tuple(f"{name}." for name in heads_of(model))
    return {
        name: module
        for name, module in model.named_modules()
        if sizes(module) and _runs(module) and not f"{name}.".startswith(heads)
    }


def heads_of(model: nn.Module) -> list[str]:
    """The model's heads for a task, which are new for every task: they are trained whole, and kept with the adapter."""
    return [name for name, _ in model.named_children() if name in HEADS]
