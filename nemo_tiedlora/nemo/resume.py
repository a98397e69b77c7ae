"""Training checkpoints that outlive their layout: one file, every tensor whole, adapter and optimizer state by key.

NeMo writes one file per tensor and pipeline rank, with optimizer states by position; such a run can only go on under
the layout it began with. For a model that trains nothing but adapters of ours the same content is gathered into one
file, which rank 0 writes and every rank of any layout reads its part of.
"""

import re
from pathlib import Path
from typing import Any

import torch
from nemo.utils.callbacks.nemo_model_checkpoint import NeMoModelCheckpoint
from torch import Tensor

from nemo_tiedlora.nemo.saved import only_ours, part, whole

#: Where the whole tensors are in a checkpoint.
KEY = "adapters"


def inner(trainer) -> torch.optim.Optimizer:
    """The optimizer itself: NeMo wraps it to keep float32 copies."""
    optimizer = trainer.optimizers[0]
    return getattr(optimizer, "optimizer", optimizer)


def knows_keys(optimizer) -> bool:
    """Whether an optimizer's groups are ours; Megatron's distributed one makes groups of its own."""
    return any("adapter" in group for group in optimizer.param_groups)


def on_save_checkpoint(model, checkpoint: dict[str, Any]) -> None:
    """Replace this rank's tensors and optimizer states by whole ones. All ranks must call it together."""
    optimizer = inner(model.trainer)
    if not only_ours(model) or not knows_keys(optimizer):
        return
    checkpoint[KEY] = {}
    for scheme in model.adaptations:
        mine = {}
        for key, group, tensor in trained(optimizer, scheme):
            settings = {name: value for name, value in group.items() if name not in ("params", "keys")}
            mine[key] = {"tensor": tensor, "settings": settings, **optimizer.state.get(tensor, {})}
        checkpoint[KEY][scheme] = whole(model, scheme, mine)
    checkpoint["state_dict"], checkpoint["optimizer_states"] = {}, []


@torch.no_grad()
def on_load_checkpoint(model, checkpoint: dict[str, Any]) -> None:
    """Take this rank's part of every whole tensor and optimizer state."""
    optimizer = inner(model.trainer)
    for scheme, saved in checkpoint[KEY].items():
        for key, (_, tensor) in model.adaptations[scheme].bank.trained().items():
            tensor.copy_(part(model, scheme, key, saved[key]["tensor"]))
        for key, group, tensor in trained(optimizer, scheme):
            state = {name: part(model, scheme, key, value) for name, value in saved[key].items()}
            tensor.copy_(state.pop("tensor"))  # the float32 copy, where there is one
            group.update(state.pop("settings"))
            if state:
                optimizer.state[tensor] = {name: _like(tensor, value) for name, value in state.items()}
    for scheduler in checkpoint["lr_schedulers"]:
        for name in ("base_lrs", "_last_lr"):  # of every group, and all alike; there may be another number here
            scheduler[name] = scheduler[name][:1] * len(optimizer.param_groups)


def _like(tensor: Tensor, value: Any) -> Any:
    """A tensor's optimizer state as its optimizer would have it: counters of steps stay on the CPU."""
    if isinstance(value, Tensor):
        return value.clone().to(tensor.device) if value.dim() else value.clone()
    return value


def trained(optimizer: torch.optim.Optimizer, scheme: str):
    """(key, group, tensor) of every tensor that the optimizer trains for a scheme."""
    for group in optimizer.param_groups:
        if group.get("adapter") == scheme:
            for key, tensor in zip(group["keys"], group["params"], strict=True):
                yield key, group, tensor


def keep_one_last(folder: Path) -> None:
    """Leave the newest complete ``*-last.ckpt`` below ``folder`` only.

    A kill in the middle of saving can leave two, or none but an incomplete one; NeMo would refuse to go on from either.
    Every rank may do this before it looks for what to resume: none saves before all have looked.
    """
    found = sorted(folder.rglob("*-last.ckpt"), key=_step)
    complete = [path for path in found if not NeMoModelCheckpoint.is_checkpoint_unfinished(path)]
    for path in found:
        if path not in complete[-1:]:
            path.unlink(missing_ok=True)
            NeMoModelCheckpoint.format_checkpoint_unfinished_marker_path(path).unlink(missing_ok=True)


def _step(path: Path) -> int:
    return int((re.search(r"step=(\d+)", path.name) or [0, 0])[1])


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
