"""Settings that every method has."""

import math
from collections.abc import Collection, Iterable
from dataclasses import MISSING, dataclass, field, fields
from typing import Any, get_args

from nemo_tiedlora.errors import UsageError, check_choice, closest
from nemo_tiedlora.variants import drawing, drawing_by_torch
from nemo_tiedlora.variants.frozen import check_records
from nemo_tiedlora.variants.init import RULES, Distribution

#: A setting that its config derives from others where nothing, or null, is said; once there is a config, it is set.
DERIVED: Any = None


@dataclass(kw_only=True)
class VariantConfig:
    """What a user can set for any method, under ``model.peft.<scheme>_tuning``.

    Args:
        scheme: name of the method that the settings are for; not a setting itself. ``config_for`` sets it.
        target_modules: kinds of linear layer to adapt.
        rank: r.
        alpha: s = alpha / rank; null means alpha = rank, so s = 1.
        dropout: probability of dropping an input of the adapter during training.
        init_A, init_B: initialiser of each matrix: normal, kaiming_uniform, kaiming_normal or xavier.
        std_A, std_B: explicit standard deviation; null derives it from the shape.
        seed: what the start values are drawn from; frozen ones are drawn from it again, so it is part of the adapter.
        layer_selection: 1-based numbers of the layers to adapt; null means all.
        dora: also train the length of every row of W + ΔW, as DoRA does.
        lr_ratio: learning rate of what B_l is made of, divided by that of the rest (LoRA+); 1 is no difference.
        store_frozen: save frozen random tensors too: a larger file, in which nothing needs to be drawn again.
        drawing_rule: how random values are drawn: 2, the same bits on every machine; or 1, as earlier versions did.
            null means 2, but 1 for an adapter whose ``checksums`` were recorded without a rule, by such a version.
        checksums: SHA-256 and fingerprint of each frozen random tensor. Recorded by training, checked when the adapter
            is restored.

    Raises:
        UsageError: a value that makes no sense.
    """

    scheme: str = ""
    target_modules: list[str] = field(default_factory=lambda: ["attention_qkv"])
    rank: int = 8
    alpha: float | None = None
    dropout: float = 0.0
    init_A: Distribution = "normal"
    init_B: Distribution = "normal"
    std_A: float | None = None
    std_B: float | None = None
    seed: int = 1234
    layer_selection: list[int] | None = None
    dora: bool = False
    lr_ratio: float = 1.0
    store_frozen: bool = False
    drawing_rule: int = DERIVED
    checksums: dict[str, str] | None = None

    def __post_init__(self):
        check_list("target_modules", self.target_modules, str)
        if self.layer_selection is not None:
            check_list("layer_selection", self.layer_selection, int)
        for name in ("alpha", "dropout", "std_A", "std_B", "lr_ratio"):
            value = getattr(self, name)
            if value is None and name in ("alpha", "std_A", "std_B"):
                continue
            check_number(name, value)
        if isinstance(self.rank, bool) or not isinstance(self.rank, int) or self.rank <= 0:
            raise UsageError("rank", self.rank, "must be a whole number > 0")
        if self.alpha is not None and not self.alpha > 0:
            raise UsageError("alpha", self.alpha, "must be > 0, or null for alpha = rank")
        if not 0 <= self.dropout < 1:
            raise UsageError("dropout", self.dropout, "must be at least 0 and less than 1")
        if not self.lr_ratio > 0:
            raise UsageError("lr_ratio", self.lr_ratio, "must be > 0")
        for name in ("dora", "store_frozen"):
            check_choice(name, getattr(self, name), (True, False))
        for matrix in ("A", "B"):
            check_choice(f"init_{matrix}", getattr(self, f"init_{matrix}"), get_args(Distribution))
            std = getattr(self, f"std_{matrix}")
            if std is not None and not std > 0:
                raise UsageError(f"std_{matrix}", std, "must be > 0, or null to derive it from the shape")
        if self.checksums is not None:
            check_records("checksums", self.checksums)
        if self.drawing_rule is None:
            self.drawing_rule = drawing_by_torch.RULE if self.checksums else drawing.RULE
        check_choice("drawing_rule", self.drawing_rule, RULES)

    @classmethod
    def defaults(cls) -> dict[str, Any]:
        """Every setting with the value it has if nothing is said."""
        found = {}
        for item in fields(cls):
            if item.name != "scheme":
                found[item.name] = item.default if item.default_factory is MISSING else item.default_factory()
        return found

    def adapted_layers(self, number: int) -> list[int]:
        """The layers to adapt, counted from 0, of a model that has ``number`` of them."""
        return [layer - 1 for layer in self.layer_selection or range(1, number + 1)]


def check_number(name: str, given: object) -> None:
    """Raise ``UsageError`` unless ``given`` is a number."""
    if isinstance(given, bool) or not isinstance(given, int | float):
        raise UsageError(name, given, "must be a number")


def check_start(name: str, given: float, trained: Collection[str]) -> None:
    """Raise ``UsageError`` unless ``given`` is a value that u can start from, where u is trained."""
    check_number(name, given)
    if not (math.isfinite(given) and given):
        raise UsageError(name, given, "must be a finite number other than 0, from which v would never leave 0")
    if given != 1 and "u" not in trained:
        raise UsageError(name, given, f"u is not trained, but {', '.join(trained)}; an untrained u is 1")


def check_list(name: str, given: object, kind: type) -> None:
    """Raise ``UsageError`` unless ``given`` is a list with something in it, all of one kind."""
    words = {str: "names", int: "whole numbers"}[kind]
    if not isinstance(given, list | tuple) or not given or not all(type(item) is kind for item in given):
        raise UsageError(
            name, given, f"write a list of {words}, such as {['attention_qkv'] if kind is str else [1, 2]}"
        )


def parts(name: str, given: Iterable[str], valid: Collection[str]) -> list[str]:
    """The named parts in canonical order, each once; ``AB`` and ``[A, B]`` mean the same."""
    if not isinstance(given, str | list | tuple):
        raise UsageError(name, given, f"write a list of some of {', '.join(valid)}")
    given = list(given)
    for part in given:
        if part not in valid:
            raise UsageError(name, part, closest(part, valid))
    return [part for part in valid if part in given]
