"""The weights of a transformers model in memory, as those of the base that NeMo would have of it."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from nemo_tiedlora.attach.placed import Place, PlacedWeight
from nemo_tiedlora.checkpoint.base import checksums
from nemo_tiedlora.huggingface.placing import Known, place
from nemo_tiedlora.model.targets import shape, whole
from nemo_tiedlora.variants import Site


class HeldBase:
    """A model's linear layers by path and number, (out, in), with Megatron's order of rows.

    Args:
        dtype: of the weights; None: the model's.
    """

    def __init__(self, model: nn.Module, known: Known, dtype: torch.dtype | None = None):
        self.model, self.known, self.dtype = model, known, dtype

    def weight(self, path: str, layer: int) -> Tensor:
        """The whole weight of one linear layer, on the CPU; see ``BaseFile.weight``."""
        target = whole(path)
        site = Site(target, layer, *shape(target, self.known.shape))
        weight = PlacedWeight(place(self.model, site, self.known))
        return weight(self.dtype or weight.tensor.dtype).cpu()

    def checksums(self, paths: list[str]) -> dict[str, str]:
        """Those of the base that the model becomes; see ``BaseFile.checksums``."""
        return checksums({path: range(self.known.shape.num_layers) for path in paths}, self.weight)


def checksums_of(places: list[Place], dtype: torch.dtype | None = None) -> dict[str, str]:
    """SHA-256 of the adapted weights of each kind, by kind, as ``BaseFile.checksums``; ``dtype`` as of ``HeldBase``."""
    weights = {(one.site.target, one.site.layer): PlacedWeight(one) for one in places}
    layers: dict[str, list[int]] = {}
    for target, layer in weights:
        layers.setdefault(target, []).append(layer)
    return checksums(
        layers, lambda target, layer: (weight := weights[target, layer])(dtype or weight.tensor.dtype).cpu()
    )
