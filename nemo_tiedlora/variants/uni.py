"""Uni-LoRA (Li, Han, Su, Li, Cai, Ji, arXiv:2506.00799): every value of every factor is one of a single trained vector.

    θ_D = P θ_d        P: (D, d), one entry in each row, in a random column j: 1/√n_j                     (section 3)

θ_D is all A_l and B_l of all targets one after the other, and n_j how many rows of P have their entry in column j, so
that PᵀP = 1 and distances in θ_d are distances in θ_D. P is kept as the column of each row.
"""

from collections.abc import Iterable, Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from nemo_tiedlora.errors import UsageError
from nemo_tiedlora.variants.base import Factors, Site, TensorSpec, Variant
from nemo_tiedlora.variants.config import VariantConfig, check_number
from nemo_tiedlora.variants.init import INTEGERS, Init
from nemo_tiedlora.variants.weight import FrozenWeight

#: Whole numbers up to here are exact in float32, in which checksums are formed.
MOST = 2**24


@dataclass(kw_only=True)
class UniConfig(VariantConfig):
    """Settings of Uni-LoRA, beside those of every method, of which ``init_*`` and ``std_*`` have no effect.

    Args:
        dimension: d, the number of trained parameters of the whole adapter.
        bound: θ_d starts uniform between −``bound`` and ``bound``; at 0 it would stay there.
    """

    scheme: str = "uni_lora"
    dimension: int = 4096
    bound: float = 0.02

    def __post_init__(self):
        super().__post_init__()
        if type(self.dimension) is not int or not 1 <= self.dimension <= MOST:
            raise UsageError("dimension", self.dimension, f"must be a whole number from 1 to {MOST}")
        check_number("bound", self.bound)
        if not self.bound > 0:
            raise UsageError("bound", self.bound, "must be > 0")


class Uni(Variant[UniConfig]):
    """Uni-LoRA as a source of factors."""

    takes_turns = False

    def __init__(self, config: UniConfig, layers: int):
        super().__init__(config, layers)
        self._sites: list[Site] = []
        self._entries: dict[tuple[torch.device, torch.dtype], Tensor] = {}

    def tensors(self, site: Site) -> dict[str, TensorSpec]:
        config, prefix = self.config, f"{site.target}.{site.layer}."
        theta = Init("kaiming_uniform", std=config.bound / 3**0.5)
        column = Init(INTEGERS, below=config.dimension)
        return {
            "theta_A": TensorSpec("theta", (config.dimension,), theta, True, "A"),
            "theta_B": TensorSpec("theta", (config.dimension,), theta, True, "B"),
            "columns_A": TensorSpec(f"{prefix}columns_A", ("rank", "in"), column, False, "A"),
            "columns_B": TensorSpec(f"{prefix}columns_B", ("out", "rank"), column, False, "B"),
        }

    def start(self, sites: Iterable[Site]) -> None:
        self._sites = list(sites)
        values = sum(self.rank * (site.in_features + site.out_features) for site in self._sites)
        if self.config.dimension > values:
            raise UsageError("dimension", self.config.dimension, f"all factors together have {values} values only")

    def factors(self, site: Site, tensors: Mapping[str, Tensor], weight: FrozenWeight) -> Factors:
        entries = self._entries_like(tensors["theta_A"])
        A = (tensors["theta_A"] * entries)[tensors["columns_A"]]
        B = (tensors["theta_B"] * entries)[tensors["columns_B"]]
        return Factors(A, B, self.scale)

    def _entries_like(self, theta: Tensor) -> Tensor:
        """1/√n_j: (dimension,); 0 for a column without an entry."""
        place = theta.device, theta.dtype
        if place not in self._entries:
            counts = torch.zeros(self.config.dimension, dtype=torch.float64)
            for site in self._sites:
                for spec in self.tensors(site).values():
                    if not spec.trained:
                        columns = spec.init.draw(spec.shape(site, self.rank), self.seed, spec.key)
                        counts += torch.bincount(columns.flatten(), minlength=self.config.dimension)
            entries = torch.where(counts > 0, counts.clamp_min(1).rsqrt(), 0)
            self._entries[place] = entries.to(device=theta.device, dtype=theta.dtype)
        return self._entries[place]
