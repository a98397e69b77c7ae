"""Training checkpoints that outlive their layout: one file, every tensor whole, adapter and optimizer state by key.

NeMo writes one file per tensor and pipeline rank, with optimizer states by position; such a run can only go on under
the layout it began with. For a model that trains nothing but adapters of ours the same content is gathered into one
file, which rank 0 writes and every rank of any layout reads its part of.
"""

import re
import zipfile
from pathlib import Path
from typing import Any

import torch
from lightning.pytorch import Callback
from nemo.utils.callbacks.nemo_model_checkpoint import NeMoModelCheckpoint

from nemo_tiedlora.errors import UsageError
from nemo_tiedlora.nemo.optimizer_states import inner, restore, states
from nemo_tiedlora.nemo.record import Record
from nemo_tiedlora.nemo.saved import only_ours, part, whole
from nemo_tiedlora.nemo.sizes import sites
from nemo_tiedlora.variants import count, drawing_by_torch

#: Where the whole tensors are in a checkpoint.
KEY = "adapters"
#: Where the rule is, by scheme, that the frozen tensors were drawn by; they themselves are in no checkpoint.
RULES = "drawing_rules"


def on_save_checkpoint(model, checkpoint: dict[str, Any]) -> None:
    """Replace this rank's tensors and optimizer states by whole ones. All ranks must call it together."""
    if not only_ours(model):
        return
    checkpoint[KEY] = {scheme: whole(model, scheme, states(model, scheme)) for scheme in model.adaptations}
    checkpoint[RULES] = {scheme: adapted.bank.variant.drawing_rule for scheme, adapted in model.adaptations.items()}
    checkpoint["state_dict"], checkpoint["optimizer_states"] = {}, []


@torch.no_grad()
def on_load_checkpoint(model, checkpoint: dict[str, Any]) -> None:
    """Take this rank's part of every whole tensor and optimizer state.

    Raises:
        UsageError: it was trained against other frozen tensors; then nothing was changed.
    """
    for scheme in checkpoint[KEY]:
        _check_rule(model, scheme, checkpoint.get(RULES, {}).get(scheme, drawing_by_torch.RULE))
    for scheme, saved in checkpoint[KEY].items():
        mine = {}
        for key, (_, tensor) in model.adaptations[scheme].bank.trained().items():
            mine[key] = {name: part(model, scheme, key, value) for name, value in saved[key].items()}
            tensor.copy_(mine[key]["tensor"])
        restore(model, scheme, mine)
    groups = inner(model.trainer).param_groups
    for scheduler in checkpoint["lr_schedulers"]:
        for name in ("base_lrs", "_last_lr"):  # of every group, and all alike; there may be another number here
            scheduler[name] = scheduler[name][:1] * len(groups)


def _check_rule(model, scheme: str, trained: int) -> None:
    """A checkpoint that records no rule is of an earlier version."""
    variant = model.adaptations[scheme].bank.variant
    if variant.drawing_rule != trained and count(variant, sites(variant.config, model.cfg)).frozen:
        way_out = f"the checkpoint was trained against frozen factors of rule {trained}; set it to {trained} to go on"
        raise UsageError(f"model.peft.{scheme}_tuning.drawing_rule", variant.drawing_rule, way_out)


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
    return int((re.findall(r"step=(\d+)", path.name) or [0])[-1])  # the run's own name comes first


def save_checkpoint(self, stock, checkpoint, filepath, storage_options=None):
    """NLPDDPStrategy's, for one file."""
    if KEY not in checkpoint:
        return stock(self, checkpoint, filepath, storage_options)
    if self.is_global_zero:
        self.checkpoint_io.save_checkpoint(checkpoint, filepath, storage_options=storage_options)


def load_checkpoint(self, stock, checkpoint_path, *args, **kwargs):
    """NLPDDPStrategy's, for one file.

    Raises:
        UsageError: the file is cut off or was changed, or is of another run.
    """
    if Path(checkpoint_path).is_file() and only_ours(self.lightning_module):
        _check_intact(Path(checkpoint_path))
        checkpoint = self.checkpoint_io.load_checkpoint(checkpoint_path)
    else:
        checkpoint = stock(self, checkpoint_path, *args, **kwargs)
    trainer = self.lightning_module.trainer
    for callback in trainer.callbacks:
        if isinstance(callback, Recorded):
            callback.check(checkpoint, checkpoint_path, trainer.max_steps)
    return checkpoint


class Recorded(Callback):
    """Puts into every checkpoint what its run was started with, and refuses those of another run."""

    KEY = "run"

    def __init__(self, record: Record):
        self.record = record

    def on_save_checkpoint(self, trainer, model, checkpoint):
        checkpoint[self.KEY] = self.record.as_dict()

    def check(self, checkpoint: dict[str, Any], path: str | Path, max_steps: int) -> None:
        """Raise ``UsageError`` unless this run can go on from ``checkpoint``, before anything is taken from it."""
        if self.KEY not in checkpoint:
            way_out = "does not say what it was trained with; remove it to start again, or name another folder"
            raise UsageError("checkpoint", str(path), way_out)
        self.record.check_continues(Record(**checkpoint[self.KEY]), path)
        if checkpoint["global_step"] > max_steps:
            way_out = f"{path} is of step {checkpoint['global_step']} already; name another folder"
            raise UsageError("trainer.max_steps", max_steps, way_out)


def _check_intact(path: Path) -> None:
    """A torch file is a zip archive with checksums, which torch does not compare."""
    try:
        with zipfile.ZipFile(path) as archive:
            damaged = archive.testzip()
    except (zipfile.BadZipFile, EOFError, ValueError, NotImplementedError) as error:
        damaged = str(error)
    if damaged:
        way_out = f"damaged or cut off ({damaged}); put another checkpoint in its place, or remove it to start again"
        raise UsageError("checkpoint", str(path), way_out)


def remove_checkpoint(self, stock, filepath):
    """NLPDDPStrategy's, for one file."""
    if not (Path(filepath).is_file() and only_ours(self.lightning_module)):
        return stock(self, filepath)
    if self.is_global_zero:
        self.checkpoint_io.remove_checkpoint(filepath)
