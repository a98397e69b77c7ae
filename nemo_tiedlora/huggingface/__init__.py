"""Models as Hugging Face's transformers save them, taken over as bases; and adapters on such models, without NeMo.

    from nemo_tiedlora import huggingface

    adapter = huggingface.attach(model, "tied_lora", targets=["attention_qkv"], rank=8, preset="TL6")
    adapter.save("adapter")
    adapter = huggingface.load(model, "adapter")

Nothing in models' folders is run.
"""

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from nemo_tiedlora.huggingface.attached import attach as attach
    from nemo_tiedlora.huggingface.attached import load as load
    from nemo_tiedlora.huggingface.pretrained import folder_of as folder_of


def __getattr__(name: str) -> Any:
    if name in ("attach", "load"):  # they import torch
        from nemo_tiedlora.huggingface import attached

        return getattr(attached, name)
    if name == "folder_of":
        from nemo_tiedlora.huggingface.pretrained import folder_of

        return folder_of
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
