"""Tied, shared and conditional low-rank adapters for NVIDIA NeMo and Megatron.

Importing this package is cheap: NeMo and torch are imported by the functions that need them.
"""

__version__ = "0.1.0"


def register() -> None:
    """Add this package's schemes to NeMo's ``PEFT_CONFIG_MAP``.

    After it, any NeMo script accepts ``model.peft.peft_scheme=tied_lora`` with a ``model.peft.tied_lora_tuning``
    section. Calling it again changes nothing. Imports NeMo.
    """
    from nemo_tiedlora.nemo.peft_config import register_schemes

    register_schemes()
