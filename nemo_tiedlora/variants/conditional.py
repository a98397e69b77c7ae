"""CondLoRA (Kim, Sasaki, Hoshino, Honda, arXiv:2403.14946): factors are a linear function of W, one for all layers.

    A_l = θ_Aᵀ W_l        θ_A: (out, rank)                                                           (equation 5)
    B_l = W_l θ_B         θ_B: (in, rank)                                                            (equation 6)

The paper assumes square weights; this is its equations in torch layout, W (out, in), and the only orientation that
also fits rectangular ones. The authors' code, from which the published scores come, has ``A_l = θ_Aᵀ W_lᵀ`` instead.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Literal, get_args

import torch
from torch import Tensor

from nemo_tiedlora.errors import UsageError, check_choice
from nemo_tiedlora.variants import groups as grouping
from nemo_tiedlora.variants.base import Factors, Site, TensorSpec, Variant
from nemo_tiedlora.variants.config import VariantConfig
from nemo_tiedlora.variants.init import ZEROS, Distribution, Init
from nemo_tiedlora.variants.once import OncePerStep
from nemo_tiedlora.variants.weight import FrozenWeight

Orientation = Literal["paper", "authors"]


@dataclass(kw_only=True)
class ConditionalConfig(VariantConfig):
    """Settings of CondLoRA, beside those of every method.

    ``init_A`` and ``std_A`` are those of θ_A; θ_B starts at 0.

    Args:
        groups: lists of 0-based layers that have one θ each, beside the one of all other layers; null: one for all.
        orientation: ``paper``: equation 5; or ``authors``: A_l = θ_Aᵀ W_lᵀ, with θ_A (in, rank), as their code does,
            for square weights only.
    """

    scheme: str = "cond_lora"
    init_A: Distribution = "kaiming_uniform"
    groups: list[list[int]] | None = None
    orientation: Orientation = "paper"

    def __post_init__(self):
        super().__post_init__()
        check_choice("orientation", self.orientation, get_args(Orientation))


class _Formed(torch.autograd.Function):
    """A factor that is a linear function of θ, formed before: forward hands it out, backward goes on to θ.

    It keeps no copy of W.
    """

    @staticmethod
    def forward(ctx, theta, gradient, factor):
        ctx.gradient = gradient
        return factor.view_as(factor)

    @staticmethod
    def backward(ctx, grad):
        return ctx.gradient(grad), None, None


class Conditional(Variant[ConditionalConfig]):
    """CondLoRA as a source of factors.

    Forming a pair costs as much as 2·rank extra tokens in the layer, so it is done once per optimizer step: all
    micro-batches and generation steps until θ changes use the same pair.
    """

    reads_weight = True

    def __init__(self, config: ConditionalConfig, layers: int):
        super().__init__(config, layers)
        groups = grouping.check(config.groups or [], layers)
        self.group = {layer: f"group{group[0]}." for group in groups for layer in group}
        self.turned = config.orientation == "authors"
        self._once = OncePerStep()

    def final_at_merge(self) -> str | None:
        return "CondLoRA formed it from the weights that it changed"

    def check(self, site: Site) -> None:
        super().check(site)
        if self.turned and site.in_features != site.out_features:
            shape = f"{site.target} has shape ({site.out_features}, {site.in_features})"
            raise UsageError("orientation", self.config.orientation, f"is for square weights; {shape}; write paper")

    def tensors(self, site: Site) -> dict[str, TensorSpec]:
        prefix = f"{site.target}.{self.group.get(site.layer, '')}"
        theta_A = Init(self.config.init_A, self.config.std_A)
        return {
            "theta_A": TensorSpec(f"{prefix}theta_A", ("in" if self.turned else "out", "rank"), theta_A, True, "A"),
            "theta_B": TensorSpec(f"{prefix}theta_B", ("in", "rank"), ZEROS, True, "B"),
        }

    def factors(self, site: Site, tensors: Mapping[str, Tensor], weight: FrozenWeight) -> Factors:
        theta_A, theta_B = tensors["theta_A"], tensors["theta_B"]
        product, gradient = (
            (weight.turned, weight.turned_gradient) if self.turned else (weight.left, weight.left_gradient)
        )
        A, B = self._once(site, (theta_A, theta_B), weight, lambda: (product(theta_A), weight.right(theta_B)))
        A, B = _Formed.apply(theta_A, gradient, A), _Formed.apply(theta_B, weight.right_gradient, B)
        return Factors(A, B, self.scale)
