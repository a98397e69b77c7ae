"""Tied-LoRA (Renduchintala, Konuk, Kuchaiev, arXiv:2311.09578), with LoRA and VeRA as special cases.

    A_l = diag(u_l) A          B_l = diag(v_l) B                                        (paper, equation 1)

One pair A (rank, in), B (out, rank) per kind of target module is shared by all layers; u_l (rank) and v_l (out)
belong to one layer. Which of the four are trained, and which of A and B are tied, is a free choice; the paper's
table 1 names some of them.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Literal, get_args

from torch import Tensor

from nemo_tiedlora.errors import UsageError, check_choice
from nemo_tiedlora.variants.base import PARTS, Factors, Site, TensorSpec, Variant, scaled
from nemo_tiedlora.variants.config import DERIVED, VariantConfig, check_start, parts
from nemo_tiedlora.variants.init import ZEROS, Init, constant
from nemo_tiedlora.variants.weight import FrozenWeight

Preset = Literal["LoRA", "TL1", "TL2", "TL3", "TL4", "TL5", "TL6", "VeRA"]
InitScheme = Literal["paper", "zero_delta", "authors"]
#: Paper, table 1: what each named configuration trains, and what it ties.
PRESETS: dict[Preset, tuple[str, str]] = {
    "LoRA": ("AB", ""),
    "TL1": ("A", "AB"),
    "TL2": ("Auv", "AB"),
    "TL3": ("B", "AB"),
    "TL4": ("Bu", "AB"),
    "TL5": ("AB", "AB"),
    "TL6": ("ABuv", "AB"),
    "VeRA": ("uv", "AB"),
}


@dataclass(kw_only=True)
class TiedConfig(VariantConfig):
    """Settings of Tied-LoRA, beside those of every method.

    Args:
        preset: ``TL1`` to ``TL6`` (TL6 is the paper's recommendation), ``VeRA`` or ``LoRA``.
        train: parts to train, any of A, B, u, v; null takes the preset's. An untrained u or v is left out (it is 1).
        tie: which of A, B are shared by all layers; null takes the preset's.
        init_scheme: ``paper`` (table 1; TL1, TL3 and TL4 then change the model before the first step);
            ``zero_delta`` (a trained part starts at 0, so that training starts from the base model exactly); or
            ``authors``: as ``paper``, with the standard deviation of their research branch, which is 1 whatever the
            shape. At width 512 and rank 8, ‖ΔW x‖ of TL1 and TL3 is then 139 times ‖W x‖, and not 2, before the first
            step, and an update changes ΔW about √(in · rank) times as much.
        init_u: what a trained u starts at: 1 in the paper; VeRA's (arXiv:2310.11454) and Hugging Face's start at 0.1.
    """

    scheme: str = "tied_lora"
    preset: Preset = "TL6"
    train: list[str] = DERIVED
    tie: list[str] = DERIVED
    init_scheme: InitScheme = "paper"
    init_u: float = 1.0

    def __post_init__(self):
        super().__post_init__()
        check_choice("preset", self.preset, get_args(Preset))
        check_choice("init_scheme", self.init_scheme, get_args(InitScheme))
        preset_train, preset_tie = PRESETS[self.preset]
        self.train = parts("train", preset_train if self.train is None else self.train, PARTS)
        self.tie = parts("tie", preset_tie if self.tie is None else self.tie, ("A", "B"))
        if not self.train:
            raise UsageError("train", self.train, f"nothing would be trained; name some of {', '.join(PARTS)}")
        check_start("init_u", self.init_u, self.train)
        if self.init_u != 1 and self.init_scheme == "zero_delta" and self.train == ["u"]:
            raise UsageError("init_u", self.init_u, "zero_delta starts u at 0 here: nothing else is trained")


class Tied(Variant[TiedConfig]):
    """Tied-LoRA as a source of factors."""

    def __init__(self, config: TiedConfig, layers: int):
        super().__init__(config, layers)
        self.inits = self._inits()

    def _inits(self) -> dict[str, Init]:
        """Column "initialisation" of the presets' table, stated as a rule that covers every choice of trained parts.

        The papers start from ΔW = 0 by v = 0 where v is trained, by B = 0 where A and B both are, and not at all
        otherwise; ``zero_delta`` closes that gap with the one trained part that can be 0.
        """
        config, trained = self.config, set(self.config.train)
        std = 1.0 if config.init_scheme == "authors" else None
        inits = {
            "A": Init(config.init_A, config.std_A or std),
            "B": Init(config.init_B, config.std_B or std),
            "u": constant(config.init_u),
        }
        if "v" in trained:
            inits["v"] = ZEROS
        elif {"A", "B"} <= trained or (config.init_scheme == "zero_delta" and "B" in trained):
            inits["B"] = ZEROS
        elif config.init_scheme == "zero_delta":
            inits["A" if "A" in trained else "u"] = ZEROS
        return inits

    def tensors(self, site: Site) -> dict[str, TensorSpec]:
        specs = {}
        for part in PARTS:
            trained = part in self.config.train
            if part in "uv" and not trained:
                continue  # frozen at 1: diag(1) A is A
            tied = part in self.config.tie
            key = f"{site.target}.{part}" if tied else f"{site.target}.{site.layer}.{part}"
            specs[part] = PARTS[part].spec(key, self.inits[part], trained)
        return specs

    def factors(self, site: Site, tensors: Mapping[str, Tensor], weight: FrozenWeight) -> Factors:
        return scaled(tensors, self.scale)
