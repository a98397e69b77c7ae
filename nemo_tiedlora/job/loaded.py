"""What a saved adapter does to each layer of its base."""

from pathlib import Path
from typing import NamedTuple

import torch

from nemo_tiedlora.checkpoint.saved import check_adapter
from nemo_tiedlora.errors import UsageError
from nemo_tiedlora.job.generate import generator
from nemo_tiedlora.model.data import ModelConfig
from nemo_tiedlora.variants import METHODS, Factors, FrozenWeight, Site


class AdaptedLayer(NamedTuple):
    """A layer's factors and its frozen weight."""

    factors: Factors
    weight: FrozenWeight


def check_adapted(base: ModelConfig, adapter: Path, field: str) -> None:
    """Raise ``UsageError`` unless ``adapter`` is of one of our schemes and fits a base of this config."""
    scheme = check_adapter(adapter, base, field)["peft"]["peft_scheme"]
    if scheme not in METHODS:
        raise UsageError(field, str(adapter), f"of scheme {scheme}; only {', '.join(METHODS)} are sources of factors")


def adapted_layers(base: Path, adapter: Path) -> dict[Site, AdaptedLayer]:
    """Load a base with an adapter: every adapted layer, in the order of targets and layers.

    The base stays in memory as long as some ``AdaptedLayer`` of it does.

    Raises:
        UsageError: an adapter with NaN or infinity in it.
    """
    from nemo_tiedlora.nemo.adapter import FactorAdapter

    with generator(base, adapter) as loaded, torch.no_grad():
        adapters = [module for module in loaded.model.modules() if isinstance(module, FactorAdapter)]
        layers = {one.site: AdaptedLayer(one.factors().folded(), one.frozen()) for one in adapters}
    for site, (factors, _) in layers.items():
        if not (factors.A.isfinite().all() and factors.B.isfinite().all()):
            raise UsageError("adapter", str(adapter), f"{site.target} of layer {site.layer} is not finite")
    return dict(sorted(layers.items(), key=lambda item: (item[0].target, item[0].layer)))
