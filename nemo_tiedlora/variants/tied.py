"""Tied-LoRA (Renduchintala, Konuk, Kuchaiev, arXiv:2311.09578), with LoRA and VeRA as special cases.

    A_l = diag(u_l) A          B_l = diag(v_l) B                                        (paper, equation 1)

One pair A (rank, in), B (out, rank) per kind of target module is shared by all layers; u_l (rank) and v_l (out)
belong to one layer. Which of the four are trained, and which of A and B are tied, is a free choice; the paper's
table 1 names some of them.
"""

from collections.abc import Mapping
from dataclasses import dataclass, field

from torch import Tensor

from nemo_tiedlora.errors import UsageError, check_choice, closest
from nemo_tiedlora.variants.base import Factors, Site, TensorSpec, Variant
from nemo_tiedlora.variants.init import STD, Init

PARTS = ("A", "B", "u", "v")

#: Paper, table 1: what each named configuration trains, and what it ties.
PRESETS: dict[str, tuple[str, str]] = {
    "LoRA": ("AB", ""),
    "TL1": ("A", "AB"),
    "TL2": ("Auv", "AB"),
    "TL3": ("B", "AB"),
    "TL4": ("Bu", "AB"),
    "TL5": ("AB", "AB"),
    "TL6": ("ABuv", "AB"),
    "VeRA": ("uv", "AB"),
}


@dataclass
class TiedConfig:
    """Settings of Tied-LoRA: exactly what a user writes under ``model.peft.tied_lora_tuning``.

    Args:
        target_modules: kinds of linear layer to adapt.
        preset: ``TL1`` to ``TL6`` (TL6 is the paper's recommendation), ``VeRA`` or ``LoRA``.
        train: parts to train, any of A, B, u, v; null takes the preset's. An untrained u or v is left out (it is 1).
        tie: which of A, B are shared by all layers; null takes the preset's.
        rank: r.
        alpha: s = alpha / rank; null means alpha = rank, as in the paper, so s = 1.
        dropout: probability of dropping an input of the adapter during training.
        init_scheme: ``paper`` (table 1; TL1, TL3 and TL4 then change the model before the first step) or
            ``zero_delta`` (a trained part starts at 0, so that training starts from the base model exactly).
        init_A, init_B: initialiser of each matrix: normal, kaiming_uniform, kaiming_normal or xavier.
        std_A, std_B: explicit standard deviation; null derives it from the shape.
        seed: frozen matrices are drawn again from it, so it is part of the adapter.
        layer_selection: 1-based numbers of the layers to adapt; null means all.
        checksums: SHA-256 of each frozen matrix. Recorded by training, checked when the adapter is restored.
    """

    target_modules: list[str] = field(default_factory=lambda: ["attention_qkv"])
    preset: str = "TL6"
    train: list[str] | None = None
    tie: list[str] | None = None
    rank: int = 8
    alpha: float | None = None
    dropout: float = 0.0
    init_scheme: str = "paper"
    init_A: str = "normal"
    init_B: str = "normal"
    std_A: float | None = None
    std_B: float | None = None
    seed: int = 1234
    layer_selection: list[int] | None = None
    checksums: dict[str, str] | None = None

    def __post_init__(self):
        check_choice("preset", self.preset, PRESETS)
        preset_train, preset_tie = PRESETS[self.preset]
        self.train = _parts("train", preset_train if self.train is None else self.train, PARTS)
        self.tie = _parts("tie", preset_tie if self.tie is None else self.tie, ("A", "B"))
        if not self.train:
            raise UsageError("train", self.train, f"nothing would be trained; name some of {', '.join(PARTS)}")
        if isinstance(self.rank, bool) or not isinstance(self.rank, int) or self.rank <= 0:
            raise UsageError("rank", self.rank, "must be a whole number > 0")
        if self.alpha is not None and not self.alpha > 0:
            raise UsageError("alpha", self.alpha, "must be > 0, or null for alpha = rank")
        if not 0 <= self.dropout < 1:
            raise UsageError("dropout", self.dropout, "must be at least 0 and less than 1")
        check_choice("init_scheme", self.init_scheme, ("paper", "zero_delta"))
        check_choice("init_A", self.init_A, STD)
        check_choice("init_B", self.init_B, STD)


def _parts(name: str, given: list[str] | str, valid: tuple[str, ...]) -> list[str]:
    """The parts in canonical order, each once; ``AB`` and ``[A, B]`` mean the same."""
    for part in given:
        if part not in valid:
            raise UsageError(name, part, closest(part, valid))
    return [part for part in valid if part in given]


class Tied(Variant):
    """Tied-LoRA as a source of factors."""

    def __init__(self, config: TiedConfig):
        self.config = config
        self.rank = config.rank
        self.scale = (config.alpha or config.rank) / config.rank
        self.seed = config.seed
        self.inits = self._inits()

    def _inits(self) -> dict[str, Init]:
        """Column "initialisation" of the presets' table, stated as a rule that covers every choice of trained parts.

        The papers start from ΔW = 0 by v = 0 where v is trained, by B = 0 where A and B both are, and not at all
        otherwise; ``zero_delta`` closes that gap with the one trained part that can be 0.
        """
        config, zero = self.config, Init("zeros")
        inits = {
            "A": Init(config.init_A, config.std_A),
            "B": Init(config.init_B, config.std_B),
            "u": Init("ones"),
            "v": Init("ones"),
        }
        trained = set(config.train)
        if "v" in trained:
            inits["v"] = zero
        elif {"A", "B"} <= trained or (config.init_scheme == "zero_delta" and "B" in trained):
            inits["B"] = zero
        elif config.init_scheme == "zero_delta":
            inits["A" if "A" in trained else "u"] = zero
        return inits

    def tensors(self, site: Site) -> dict[str, TensorSpec]:
        axes = {"A": ("rank", "in"), "B": ("out", "rank"), "u": ("rank",), "v": ("out",)}
        specs = {}
        for part in PARTS:
            trained = part in self.config.train
            if part in "uv" and not trained:
                continue  # frozen at 1: diag(1) A is A
            tied = part in self.config.tie
            key = f"{site.target}.{part}" if tied else f"{site.target}.{site.layer}.{part}"
            specs[part] = TensorSpec(key, axes[part], self.inits[part], trained)
        return specs

    def factors(self, site: Site, tensors: Mapping[str, Tensor]) -> Factors:
        A, B = tensors["A"], tensors["B"]
        if "u" in tensors:
            A = tensors["u"][:, None] * A
        if "v" in tensors:
            B = tensors["v"][:, None] * B
        return Factors(A, B, self.scale)
