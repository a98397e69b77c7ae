"""The methods: where a layer's low-rank factors come from. Plain torch; nothing here knows NeMo or process groups."""

from nemo_tiedlora.variants.bank import Bank
from nemo_tiedlora.variants.base import Count, Factors, Site, TensorSpec, Variant, count, merged
from nemo_tiedlora.variants.conditional import Conditional, ConditionalConfig
from nemo_tiedlora.variants.config import VariantConfig
from nemo_tiedlora.variants.dynamic import Dynamic, DynamicConfig
from nemo_tiedlora.variants.frozen import checksum
from nemo_tiedlora.variants.init import Init
from nemo_tiedlora.variants.registry import METHODS, OF_YOUR_OWN, Method, build, config_for
from nemo_tiedlora.variants.shared import Shared, SharedConfig
from nemo_tiedlora.variants.tied import PRESETS, Tied, TiedConfig
from nemo_tiedlora.variants.weight import FrozenWeight

__all__ = [
    "METHODS",
    "OF_YOUR_OWN",
    "PRESETS",
    "Bank",
    "Conditional",
    "ConditionalConfig",
    "Count",
    "Dynamic",
    "DynamicConfig",
    "Factors",
    "FrozenWeight",
    "Init",
    "Method",
    "Shared",
    "SharedConfig",
    "Site",
    "TensorSpec",
    "Tied",
    "TiedConfig",
    "Variant",
    "VariantConfig",
    "build",
    "checksum",
    "config_for",
    "count",
    "merged",
]
