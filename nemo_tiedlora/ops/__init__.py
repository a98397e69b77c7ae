"""The one operation of all adapters: ``y += s · ((x Aᵀ) ⊙ u) Bᵀ``."""

from nemo_tiedlora.ops.apply import Exchange, apply

__all__ = ["Exchange", "apply"]
