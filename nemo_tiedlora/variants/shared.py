"""ShareLoRA (anonymous, "Less Tuning, More Performance", no arXiv id): layers that are similar share their factors.

    A_l = diag(u_l) A_g(l)          B_l = diag(v_l) B_g(l)          g(l): the group of layer l       (equation 5)

u and v are not in the paper; they are trained per layer if asked for. A layer outside all groups has its own pair.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Literal, get_args

from torch import Tensor

from nemo_tiedlora.errors import UsageError
from nemo_tiedlora.variants import groups as grouping
from nemo_tiedlora.variants.base import PARTS, Factors, Site, TensorSpec, Variant, scaled
from nemo_tiedlora.variants.config import DERIVED, VariantConfig, check_start, parts
from nemo_tiedlora.variants.init import ZEROS, Init, constant
from nemo_tiedlora.variants.weight import FrozenWeight

Expansion = Literal["none", "budget"]


@dataclass(kw_only=True)
class SharedConfig(VariantConfig):
    """Settings of ShareLoRA, beside those of every method.

    Args:
        groups: lists of 0-based layers that share, e.g. ``[[16, 17], [18, 19]]``; or the JSON file that
            ``tiedlora groups`` wrote; or ``odd_even``; or ``random_adjacent`` (drawn from ``seed``). The fine-tuning
            job also takes a mapping, such as ``{data: text.jsonl, threshold: 0.85}``, and finds the groups first.
        shared_layers: for ``random_adjacent``, how many layers follow the one before them; null means a third.
        rank_expansion: ``none``; ``budget``, the largest rank that costs no more than unshared LoRA of ``rank``; or
            the rank to use, as a number.
        train: parts to train: A and B, and optionally per-layer u and v.
        init_u: what a trained u starts at.
    """

    scheme: str = "share_lora"
    groups: list | str = "odd_even"
    shared_layers: int | None = None
    rank_expansion: Expansion | int = "none"
    train: list[str] = DERIVED
    init_u: float = 1.0

    def __post_init__(self):
        super().__post_init__()
        if self.shared_layers is not None and type(self.shared_layers) is not int:
            raise UsageError("shared_layers", self.shared_layers, "must be a whole number, or null for a third")
        self.train = parts("train", "AB" if self.train is None else self.train, PARTS)
        if not {"A", "B"} <= set(self.train):
            raise UsageError("train", self.train, "ShareLoRA trains A and B, and optionally u and v")
        check_start("init_u", self.init_u, self.train)
        expansion = self.rank_expansion
        is_rank = isinstance(expansion, int) and not isinstance(expansion, bool) and expansion > 0
        if expansion not in get_args(Expansion) and not is_rank:
            raise UsageError("rank_expansion", expansion, "write none, budget or a whole number > 0")
        if expansion == "budget" and self.train != ["A", "B"]:
            raise UsageError("rank_expansion", expansion, "counts A and B only; train nothing else, or write a number")


class Shared(Variant[SharedConfig]):
    """ShareLoRA as a source of factors."""

    def __init__(self, config: SharedConfig, layers: int):
        super().__init__(config, layers)
        self.groups = self._groups()
        self.leader = {layer: group[0] for group in self.groups for layer in group}
        if config.rank_expansion == "budget":
            adapted = set(config.adapted_layers(layers))
            sharing = [[layer for layer in group if layer in adapted] for group in self.groups]
            self.rank = grouping.expanded_rank(config.rank, [group for group in sharing if group], len(adapted))
        elif isinstance(config.rank_expansion, int):
            self.rank = config.rank_expansion

    def _groups(self) -> grouping.Groups:
        config, layers = self.config, self.layers
        if config.groups == "odd_even":
            return grouping.odd_even(layers)
        if config.groups == "random_adjacent":
            shared = config.shared_layers if config.shared_layers is not None else layers // 3
            if not 0 < shared < layers:
                raise UsageError("shared_layers", shared, f"must be 1 to {layers - 1}")
            return grouping.random_adjacent(layers, shared, self.seed)
        named = grouping.read(config.groups) if isinstance(config.groups, str) else config.groups
        return grouping.check(named, layers)

    def decided(self) -> dict[str, Any]:
        return {"groups": self.groups, "rank_expansion": self.rank}

    def tensors(self, site: Site) -> dict[str, TensorSpec]:
        config = self.config
        zero_B = "v" not in config.train  # ΔW = 0 at the start: by v = 0 where v is trained, else by B = 0
        inits = {
            "A": Init(config.init_A, config.std_A),
            "B": ZEROS if zero_B else Init(config.init_B, config.std_B),
            "u": constant(config.init_u),
            "v": ZEROS,
        }
        leader = self.leader.get(site.layer, site.layer)
        owner = {"A": leader, "B": leader, "u": site.layer, "v": site.layer}
        return {part: PARTS[part].spec(f"{site.target}.{owner[part]}.{part}", inits[part]) for part in config.train}

    def factors(self, site: Site, tensors: Mapping[str, Tensor], weight: FrozenWeight) -> Factors:
        return scaled(tensors, self.scale)
