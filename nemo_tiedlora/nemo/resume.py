"""Training checkpoints that outlive their layout: one file, every tensor whole, adapter and optimizer state by key.

NeMo writes one file per tensor and pipeline rank, with optimizer states by position; such a run can only go on under
the layout it began with. For a model that trains nothing but adapters of ours the same content is gathered into one
file, which rank 0 writes and every rank of any layout reads its part of.
"""

from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from nemo_tiedlora.nemo.saved import only_ours, part, whole

#: Where the whole tensors are in a checkpoint.
KEY = "adapters"


def inner(trainer) -> torch.optim.Optimizer:
    """The optimizer itself: NeMo wraps it to keep float32 copies."""
    optimizer = trainer.optimizers[0]
    return getattr(optimizer, "optimizer", optimizer)


def on_save_checkpoint(model, checkpoint: dict[str, Any]) -> None:
    """Replace this rank's tensors and optimizer states by whole ones. All ranks must call it together."""
    if not only_ours(model):
        return
    optimizer = inner(model.trainer)
    checkpoint[KEY] = {}
    for scheme in model.adaptations:
        tensors, states, settings = {}, {}, {}
        for key, group, tensor in _trained(optimizer, scheme):
            tensors[key] = tensor
            settings[key] = {name: value for name, value in group.items() if name not in ("params", "keys")}
            for name, value in optimizer.state.get(tensor, {}).items():
                states.setdefault(name, {})[key] = value
        names = sorted({name for one in whole_objects(sorted(states)) for name in one})
        checkpoint[KEY][scheme] = {
            "tensors": whole(model, scheme, tensors),
            "state": {name: whole(model, scheme, states.get(name, {})) for name in names},
            "settings": {key: value for one in whole_objects(settings) for key, value in one.items()},
        }
    checkpoint["state_dict"], checkpoint["optimizer_states"] = {}, []


@torch.no_grad()
def on_load_checkpoint(model, checkpoint: dict[str, Any]) -> None:
    """Take this rank's part of every whole tensor and optimizer state."""
    optimizer = inner(model.trainer) if model.trainer.optimizers else None
    for scheme, saved in checkpoint[KEY].items():
        for key, tensor in model.adaptations[scheme].bank.named_tensors().items():
            if key in saved["tensors"]:
                tensor.copy_(part(model, scheme, key, saved["tensors"][key]))
        for key, group, tensor in _trained(optimizer, scheme) if optimizer else ():
            tensor.copy_(part(model, scheme, key, saved["tensors"][key]))  # the float32 copy, where there is one
            group.update(saved["settings"][key])
            state = {}
            for name, values in saved["state"].items():
                if key in values:
                    value = values[key]
                    if isinstance(value, Tensor) and value.dim():
                        value = part(model, scheme, key, value).to(tensor.device)
                    state[name] = value.clone() if isinstance(value, Tensor) else value
            if state:
                optimizer.state[tensor] = state


def _trained(optimizer: torch.optim.Optimizer, scheme: str):
    """(key, group, tensor) of every tensor that the optimizer trains for a scheme."""
    for group in optimizer.param_groups:
        if group.get("adapter") == scheme:
            for key, tensor in zip(group["keys"], group["params"], strict=True):
                yield key, group, tensor


def save_checkpoint(self, stock, checkpoint, filepath, storage_options=None):
    """NLPDDPStrategy's, for one file."""
    if KEY not in checkpoint:
        return stock(self, checkpoint, filepath, storage_options)
    if self.is_global_zero:
        self.checkpoint_io.save_checkpoint(checkpoint, filepath, storage_options=storage_options)


def load_checkpoint(self, stock, checkpoint_path, *args, **kwargs):
    """NLPDDPStrategy's, for one file."""
    if Path(checkpoint_path).is_file() and only_ours(self.lightning_module):
        return self.checkpoint_io.load_checkpoint(checkpoint_path)
    return stock(self, checkpoint_path, *args, **kwargs)


def remove_checkpoint(self, stock, filepath):
    """NLPDDPStrategy's, for one file."""
    if not (Path(filepath).is_file() and only_ours(self.lightning_module)):
        return stock(self, filepath)
    if self.is_global_zero:
        self.checkpoint_io.remove_checkpoint(filepath)
