"""LoRA-XS (Bałazy, Banaei, Aberer, Tabor, arXiv:2405.17604): a small matrix between a weight's own singular vectors.

    ΔW_l = U_r Σ_r R_l V_rᵀ        R_l: (rank, rank), trained; U Σ Vᵀ = W_l, of which the r largest       (equation 2)

So B_l = U_r Σ_r and A_l = R_l V_rᵀ. Where an adapter is used again, its U_r Σ_r and V_rᵀ come from its file: no
singular value decomposition gives the same bits everywhere.
"""

from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from nemo_tiedlora.errors import UsageError
from nemo_tiedlora.variants.base import Factors, Site, TensorSpec, Variant
from nemo_tiedlora.variants.config import VariantConfig, check_number
from nemo_tiedlora.variants.init import COMPUTED, Init
from nemo_tiedlora.variants.weight import FrozenWeight


@dataclass(kw_only=True)
class XSConfig(VariantConfig):
    """Settings of LoRA-XS, beside those of every method, of which ``init_*`` and ``std_A``, ``std_B`` have no effect.

    Args:
        std_R: standard deviation that every R_l starts with.
    """

    scheme: str = "lora_xs"
    std_R: float = 1e-5

    def __post_init__(self):
        super().__post_init__()
        check_number("std_R", self.std_R)
        if not self.std_R > 0:
            raise UsageError("std_R", self.std_R, "must be > 0")


class XS(Variant[XSConfig]):
    """LoRA-XS as a source of factors."""

    def tensors(self, site: Site) -> dict[str, TensorSpec]:
        prefix, computed = f"{site.target}.{site.layer}.", Init(COMPUTED)
        return {
            "B": TensorSpec(f"{prefix}B", ("out", "rank"), computed, False, "B"),
            "R": TensorSpec(f"{prefix}R", ("rank", "rank"), Init("normal", self.config.std_R), True, "A"),
            "A": TensorSpec(f"{prefix}A", ("rank", "in"), computed, False, "A"),
        }

    def computed(self, site: Site, weight: FrozenWeight) -> dict[str, Tensor]:
        U, S, Vh = torch.linalg.svd(weight.whole(torch.float32), full_matrices=False)
        U, S, Vh = U[:, : self.rank], S[: self.rank], Vh[: self.rank]
        # A pair of singular vectors has a sign in common, which is free: the largest entry of V's is positive.
        signs = Vh.gather(1, Vh.abs().argmax(1, keepdim=True)).sign()[:, 0]
        return {"B": U * (S * signs), "A": Vh * signs[:, None]}

    def factors(self, site: Site, tensors: Mapping[str, Tensor], weight: FrozenWeight) -> Factors:
        return Factors(tensors["R"] @ tensors["A"], tensors["B"], self.scale)
