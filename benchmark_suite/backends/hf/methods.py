"""What a variant puts on a model: an adapter of the plugin's, one of PEFT's, or nothing but gradients everywhere."""

import shutil
from pathlib import Path
from typing import Any

from torch.optim import Optimizer

from benchmark_suite.backends.hf.peft_methods import config_of
from benchmark_suite.backends.hf.targets import is_family, names_of
from benchmark_suite.backends.protocol import Training
from benchmark_suite.variant_spec import STOCK, VariantSpec
from nemo_tiedlora.facade import (
    METHODS,
    UsageError,
    attach_to_transformers,
    build_variant,
    config_for,
    count,
    found_on,
    heads_of,
)

#: Where variants that name no layers go, as all of the plugin's do.
TARGETS = ["attention_qkv"]
#: Rank of the LoRA that what has no rank is compared with.
RANK = 8


class Full:
    """Everything is trained."""

    def __init__(self, model: Any, training: Training):
        self.model = model
        #: Names of the modules that are trained whole because they are new.
        self.heads = heads_of(model)
        self.lora = _lora_size(model)
        model.requires_grad_(True)

    def groups(self, lr: float) -> list[dict[str, Any]]:
        """An optimizer's parameter groups."""
        return [{"params": [each for each in self.model.parameters() if each.requires_grad], "lr": lr}]

    def begin(self, optimizer: Optimizer) -> None:
        """Take part in its steps from now on."""

    @property
    def sizes(self) -> dict[str, Any]:
        """See ``protocol.Trained``."""
        heads = tuple(f"{name}." for name in self.heads)
        trained = {name: each.numel() for name, each in self.model.named_parameters() if each.requires_grad}
        in_heads = sum(size for name, size in trained.items() if name.startswith(heads))
        trainable = sum(trained.values()) - in_heads
        percent = round(100 * trainable / self.lora, 2) if self.lora else None
        found = {"trainable": trainable, "stored": trainable, "percent_of_lora": percent}
        return found | ({"head_parameters": in_heads} if heads else {})

    def save(self, folder: Path) -> int:
        """Write what was trained below ``folder``; how many bytes."""
        return _written(folder / "model", lambda path: self.model.save_pretrained(path))

    def take_off(self) -> bool:
        """Whether the model is as it was before."""
        return False


class Plugin(Full):
    """An adapter of the plugin's."""

    def __init__(self, model: Any, training: Training):
        self.model, self.heads = model, heads_of(model)
        variant = training.variant
        settings = {"seed": training.seed} | variant.settings_at(training.rank)
        config = config_for(variant.scheme, settings)
        targets = _targets(model, config.target_modules)
        self.adapter = attach_to_transformers(model, variant.scheme, targets, **_without_targets(settings))
        sites = [placed.place.site for placed in self.adapter.placed]
        self.lora = sum(config.rank * (site.in_features + site.out_features) for site in sites)
        counted = count(self.adapter.variant, sites)
        self.stored = counted.trainable + counted.computed + (counted.frozen if config.store_frozen else 0)

    def groups(self, lr: float) -> list[dict[str, Any]]:
        return self.adapter.parameter_groups(lr)

    def begin(self, optimizer: Optimizer) -> None:
        self.adapter.attach_to(optimizer)

    @property
    def sizes(self) -> dict[str, Any]:
        return super().sizes | {"stored": self.stored}

    def save(self, folder: Path) -> int:
        return _written(folder / "adapter", self.adapter.save)

    def take_off(self) -> bool:
        self.adapter.detach()
        return True


class Peft(Full):
    """An adapter of Hugging Face PEFT's."""

    def __init__(self, model: Any, training: Training):
        from peft import get_peft_model

        variant, rank = training.variant, training.rank
        task = "CAUSAL_LM" if training.head is None else "SEQ_CLS"
        config = config_of(variant, rank, names_of(model, _wanted(variant)), task)
        self.heads = heads_of(model)
        if self.heads:
            config.modules_to_save = self.heads
        sizes = {name: sum(module.weight.shape) for name, module in model.named_modules() if _has_matrix(module)}
        self.peft = get_peft_model(model, config)
        self.model = model
        adapted: Any = self.peft.base_model.targeted_module_names
        self.lora = (rank or RANK) * sum(sizes[name] for name in adapted)

    def save(self, folder: Path) -> int:
        return _written(folder / "adapter", self.peft.save_pretrained)


def put(model: Any, training: Training) -> Full:
    """Put a variant on a model, in place.

    Raises:
        UsageError: it does not fit.
    """
    if training.variant.is_peft:
        return Peft(model, training)
    return Full(model, training) if training.variant.scheme == "none" else Plugin(model, training)


def check(outline: Any, variant: VariantSpec, rank: int | None) -> None:
    """Raises ``UsageError`` for a variant that would not fit the model.

    Args:
        outline: the model, which needs no weights.
    """
    if variant.is_peft:
        config_of(variant, rank, names_of(outline, _wanted(variant)))
    elif variant.scheme in METHODS:
        config = config_for(variant.scheme, variant.settings_at(rank))
        found = found_on(outline, _targets(outline, config.target_modules), config, heads_of(outline))
        fitting = build_variant(config, found.layers)
        for place in found.places:
            fitting.check(place.site)
        fitting.start([place.site for place in found.places])
    elif variant.scheme in STOCK and variant.scheme != "none":
        way_out = f"{variant.scheme} is NeMo's own; here, PEFT's methods are variants: peft:lora, peft:ia3 and others"
        raise UsageError("scheme", variant.scheme, way_out)


def _lora_size(model: Any) -> int | None:
    """Trained parameters of plain LoRA where a variant goes that names no layers; None where that is not known."""
    try:
        names = names_of(model, TARGETS)
    except UsageError:
        return None
    return sum(RANK * sum(model.get_submodule(name).weight.shape) for name in names)


def _wanted(variant: VariantSpec) -> list[str]:
    given = variant.settings.get("target_modules") or TARGETS
    return [given] if isinstance(given, str) else given


def _targets(model: Any, given: list[str]) -> list[str]:
    """For the plugin, which knows the words on some models by itself, and there makes one adapter of q, k and v."""
    return given if is_family(model) else names_of(model, given)


def _without_targets(settings: dict[str, Any]) -> dict[str, Any]:
    return {name: value for name, value in settings.items() if name != "target_modules"}


def _has_matrix(module: Any) -> bool:
    weight = getattr(module, "weight", None)
    return weight is not None and weight.dim() == 2


def _written(folder: Path, save: Any) -> int:
    """Have ``save`` fill a folder anew; the bytes of what a later user needs of it."""
    shutil.rmtree(folder, ignore_errors=True)
    save(folder)
    return sum(path.stat().st_size for path in folder.rglob("*") if path.is_file() and path.name != "README.md")
