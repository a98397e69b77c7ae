"""DoRA on top of any method: the direction of every row of W + ΔW, and its length on its own (arXiv:2402.09353).

    W_l' = diag(m_l / ‖W_l + s B_l A_l‖) (W_l + s B_l A_l)        m_l: (out,), starts at ‖W_l‖         (equation 5)

Norms are of rows, which in torch layout belong to one output feature each. They count as constants in the gradient
(its section 4.3), so they are formed once per optimizer step.
"""

from collections.abc import Mapping

import torch
from torch import Tensor

from nemo_tiedlora.variants.base import Factors, Site, TensorSpec, Variant, Wrapper
from nemo_tiedlora.variants.config import VariantConfig
from nemo_tiedlora.variants.init import COMPUTED, Init
from nemo_tiedlora.variants.once import OncePerStep
from nemo_tiedlora.variants.weight import FrozenWeight


class Dora(Wrapper[VariantConfig]):
    """Any variant's factors, with a trained length for every row of the weight."""

    reads_weight = True

    def __init__(self, config: VariantConfig, inner: Variant):
        super().__init__(config, inner)
        self._once = OncePerStep()

    def tensors(self, site: Site) -> dict[str, TensorSpec]:
        m = TensorSpec(f"{site.target}.{site.layer}.m", ("out",), Init(COMPUTED), True, "")
        return {**self.inner.tensors(site), "m": m}

    def computed(self, site: Site, weight: FrozenWeight) -> dict[str, Tensor]:
        precise = torch.promote_types(weight.tensor.dtype, torch.float32)
        return {**self.inner.computed(site, weight), "m": weight.row_lengths(precise)}

    def final_at_merge(self) -> str | None:
        return "DoRA scaled the rows by their former lengths"

    def factors(self, site: Site, tensors: Mapping[str, Tensor], weight: FrozenWeight) -> Factors:
        factors = self.inner.factors(site, tensors, weight)
        norms = self._once(site, tensors.values(), weight, lambda: row_norms(weight, *factors.folded()[:3]))
        return factors._replace(gain=tensors["m"] / norms)


def row_norms(weight: FrozenWeight, A: Tensor, B: Tensor, scale: float) -> Tensor:
    """‖W + s B A‖ of every row, (out,), without forming B A: of the size of W, it would be as large as the base."""
    precise = torch.promote_types(A.dtype, torch.float32)
    A, B = A.detach().to(precise), scale * B.detach().to(precise)
    squares = weight.squared_rows(precise) + 2 * (weight.right(A.T) * B).sum(1) + ((B @ weight.gram(A)) * B).sum(1)
    return squares.clamp_min(torch.finfo(precise).tiny).sqrt()
