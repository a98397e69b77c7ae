"""Tied, shared and conditional low-rank adapters for NVIDIA NeMo and Megatron.

Importing this package is cheap: NeMo and torch are imported by the functions that need them.
"""

__version__ = "0.1.0"


def register() -> None:
    """Add this package's schemes to NeMo's ``PEFT_CONFIG_MAP`` and its adapted layers to NeMo's adapter registry.

    After it, any NeMo script accepts ``model.peft.peft_scheme=tied_lora`` with a ``model.peft.tied_lora_tuning``
    section. Calling it again changes nothing. Imports NeMo.
    """
    from nemo_tiedlora.nemo.hooks import register_schemes

    register_schemes()
