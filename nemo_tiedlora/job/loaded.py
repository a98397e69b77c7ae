"""A base that NeMo runs, and what a saved adapter does to each layer of it."""

from collections.abc import Sequence
from pathlib import Path

import torch

from nemo_tiedlora.analysis.host import AdaptedLayer
from nemo_tiedlora.checkpoint.saved import check_adapter
from nemo_tiedlora.errors import UsageError
from nemo_tiedlora.files import sha256_of
from nemo_tiedlora.huggingface.bases import find
from nemo_tiedlora.job.calibrate import layer_similarity
from nemo_tiedlora.job.generate import generator
from nemo_tiedlora.model.sizes import Sizes, sizes
from nemo_tiedlora.variants import METHODS, SharedConfig, Site


class NemoBase:
    """A base as ``huggingface.bases`` takes it, run by NeMo; see ``AnalysedBase``.

    Raises:
        UsageError: there is none of that name.
    """

    def __init__(self, named: str):
        self.found = find(named)
        self.targets = ["attention_qkv"]

    def sizes(self, config: SharedConfig) -> Sizes:
        return sizes(config, self.found.config)

    def similarity(self, texts: Sequence[str], length: int, kind: str) -> list[list[float]]:
        return layer_similarity(self.found.file(), texts, length, kind)

    def check(self, adapter: Path, field: str) -> None:
        scheme = check_adapter(adapter, self.found.config, field)["peft"]["peft_scheme"]
        if scheme not in METHODS:
            way_out = f"of scheme {scheme}; only {', '.join(METHODS)} are sources of factors"
            raise UsageError(field, str(adapter), way_out)

    def adapted(self, adapter: Path) -> dict[Site, AdaptedLayer]:
        from nemo_tiedlora.nemo.adapter import FactorAdapter

        with generator(self.found.file(), adapter) as loaded, torch.no_grad():
            adapters = [module for module in loaded.model.modules() if isinstance(module, FactorAdapter)]
            layers = {one.site: AdaptedLayer(one.factors().folded(), one.frozen()) for one in adapters}
        for site, (factors, _) in layers.items():
            if not (factors.A.isfinite().all() and factors.B.isfinite().all()):
                raise UsageError("adapter", str(adapter), f"{site.target} of layer {site.layer} is not finite")
        return dict(sorted(layers.items(), key=lambda item: (item[0].target, item[0].layer)))

    def sha256(self) -> str:
        return sha256_of(self.found.file())
