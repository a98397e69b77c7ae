"""The weights of a transformers model in memory, as those of the base that NeMo would have of it."""

from __future__ import annotations

from torch import Tensor, nn

from nemo_tiedlora.attach.placed import PlacedWeight
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
        return checksums(paths, self.known.shape.num_layers, self.weight)
