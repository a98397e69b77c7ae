"""The methods: where a layer's low-rank factors come from. Plain torch; nothing here knows NeMo or process groups."""

from nemo_tiedlora.variants.attach import attach, merge
from nemo_tiedlora.variants.bank import Bank
from nemo_tiedlora.variants.base import Count, Factors, Site, TensorSpec, Variant, count
from nemo_tiedlora.variants.init import Init, checksum
from nemo_tiedlora.variants.registry import SCHEMES, build, config_for
from nemo_tiedlora.variants.tied import PRESETS, Tied, TiedConfig

__all__ = [
    "PRESETS",
    "SCHEMES",
    "Bank",
    "Count",
    "Factors",
    "Init",
    "Site",
    "TensorSpec",
    "Tied",
    "TiedConfig",
    "Variant",
    "attach",
    "build",
    "checksum",
    "config_for",
    "count",
    "merge",
]
