"""Adapter files, in one canonical form whatever the layout they were trained in, and what is done with them."""

from nemo_tiedlora.checkpoint.adapter import Adapter, Base
from nemo_tiedlora.checkpoint.store import is_canonical, read, write

__all__ = ["Adapter", "Base", "is_canonical", "read", "write"]
