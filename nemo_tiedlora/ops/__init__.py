"""The one operation of all adapters: ``y += s · (x Aᵀ) Bᵀ``."""

from nemo_tiedlora.ops.apply import apply

__all__ = ["apply"]
