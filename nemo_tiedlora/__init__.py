"""Tied, shared and conditional low-rank adapters for NVIDIA NeMo and Megatron.

Importing this package is cheap: NeMo and torch are imported by the functions that need them.
"""

import sys
from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from nemo_tiedlora.attach.model import attach as attach
    from nemo_tiedlora.platform import Patch

__version__ = "0.1.0"


def register() -> "list[Patch]":
    """Add this package's schemes to NeMo: any NeMo script then accepts ``model.peft.peft_scheme=tied_lora`` with a
    ``model.peft.tied_lora_tuning`` section. Calling it again only adds schemes that came since. Imports NeMo.

    Returns:
        Every change to NeMo that is now in force, each with its ``name`` and the ``reason`` it is needed for, which
        names what is replaced; printed, it is a line. In short: entries in ``PEFT_CONFIG_MAP`` and the adapter
        registry; the datasets of fine-tuning rows; and, for models with an adapter of ours, how NeMo's classes tie
        weights, group what is trained, call back in training, and save and load adapters and checkpoints.
        ``unregister`` takes them back.
    """
    from nemo_tiedlora.nemo import hooks

    return hooks.register()


def unregister() -> None:
    """Take back what ``register`` changed: NeMo's classes get the very attributes they had. Does nothing if nothing is
    registered. Models that were given an adapter keep it, but NeMo no longer knows how to train or save it."""
    if hooks := sys.modules.get("nemo_tiedlora.nemo.hooks"):  # else nothing was ever registered
        hooks.unregister()


def __getattr__(name: str) -> Any:
    if name == "attach":  # a package that can be called; it imports torch
        return import_module("nemo_tiedlora.attach")
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
