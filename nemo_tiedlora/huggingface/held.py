"""The weights of a transformers model in memory, as those of the base that NeMo would have of it."""

from __future__ import annotations

from torch import Tensor, nn

from nemo_tiedlora.attach.placed import Place, PlacedWeight
from nemo_tiedlora.checkpoint.base import checksums
from nemo_tiedlora.huggingface.placing import Known, place
from nemo_tiedlora.model.targets import shape, whole
from nemo_tiedlora.variants import Site


class HeldBase:
    """A model's linear layers by path and number, (out, in), with Megatron's order of rows."""

    def __init__(self, model: nn.Module, known: Known):
        self.model, self.known = model, known

    def weight(self, path: str, layer: int) -> Tensor:
        """The whole weight of one linear layer, on the CPU, in the model's dtype; see ``BaseFile.weight``."""
        target = whole(path)
        site = Site(target, layer, *shape(target, self.known.shape))
        weight = PlacedWeight(place(self.model, site, self.known))
        return weight(weight.tensor.dtype).cpu()

    def checksums(self, paths: list[str]) -> dict[str, str]:
        """Those of the base that the model becomes; see ``BaseFile.checksums``."""
        return checksums({path: range(self.known.shape.num_layers) for path in paths}, self.weight)


def checksums_of(places: list[Place]) -> dict[str, str]:
    """SHA-256 of the adapted weights of each kind, by kind, as ``BaseFile.checksums``."""
    weights = {(one.site.target, one.site.layer): PlacedWeight(one) for one in places}
    layers: dict[str, list[int]] = {}
    for target, layer in weights:
        layers.setdefault(target, []).append(layer)
    return checksums(layers, lambda target, layer: (weight := weights[target, layer])(weight.tensor.dtype).cpu())
