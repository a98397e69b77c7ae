"""Tied, shared and conditional low-rank adapters for NVIDIA NeMo and Megatron.

Importing this package is cheap: NeMo and torch are imported by the functions that need them.
"""

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from nemo_tiedlora.attach.model import attach as attach

__version__ = "0.1.0"


def register() -> None:
    """Add this package's schemes to NeMo's ``PEFT_CONFIG_MAP`` and its adapted layers to NeMo's adapter registry.

    After it, any NeMo script accepts ``model.peft.peft_scheme=tied_lora`` with a ``model.peft.tied_lora_tuning``
    section. Calling it again changes nothing. Imports NeMo.
    """
    from nemo_tiedlora.nemo.hooks import register_schemes

    register_schemes()


def __getattr__(name: str) -> Any:
    if name == "attach":  # a package that can be called; it imports torch
        return import_module("nemo_tiedlora.attach")
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
