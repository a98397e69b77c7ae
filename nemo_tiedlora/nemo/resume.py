"""Training checkpoints that outlive their layout: one file, every tensor whole, adapter and optimizer state by key.

NeMo writes one file per tensor and pipeline rank, with optimizer states by position; such a run can only go on under
the layout it began with. For a model that trains nothing but adapters of ours the same content is gathered into one
file, which rank 0 writes and every rank of any layout reads its part of.
"""

import os
import re
from pathlib import Path
from typing import Any

import torch
from nemo.utils.callbacks.nemo_model_checkpoint import NeMoModelCheckpoint
from nemo.utils.model_utils import inject_model_parallel_rank

from nemo_tiedlora.checkpoint.adapter import specs_of
from nemo_tiedlora.checkpoint.pickles import Refused, as_it_is, is_trusted, load, with_digest
from nemo_tiedlora.checkpoint.pieces import check_folder
from nemo_tiedlora.errors import UsageError
from nemo_tiedlora.model.archive import Folder
from nemo_tiedlora.model.sizes import sites
from nemo_tiedlora.nemo.checked import Checked
from nemo_tiedlora.nemo.optimizer_states import inner, restore, settings_of, states
from nemo_tiedlora.nemo.saved import only_ours, part, whole
from nemo_tiedlora.variants import Bank, count, drawing_by_torch

#: Where the whole tensors are in a checkpoint.
KEY = "adapters"
#: Where the rule is, by scheme, that the frozen tensors were drawn by; they themselves are in no checkpoint.
RULES = "drawing_rules"
#: Where the frozen tensors are that were computed from the base: there, by scheme and key, each whole.
COMPUTED = "computed"


def on_save_checkpoint(model, checkpoint: dict[str, Any]) -> None:
    """Replace this rank's tensors and optimizer states by whole ones. All ranks must call it together."""
    if not only_ours(model):
        return
    checkpoint[KEY] = {scheme: whole(model, scheme, states(model, scheme)) for scheme in model.adaptations}
    checkpoint[RULES] = {scheme: adapted.bank.variant.drawing_rule for scheme, adapted in model.adaptations.items()}
    computed = {scheme: _computed(adapted.bank) for scheme, adapted in model.adaptations.items()}
    checkpoint[COMPUTED] = {scheme: whole(model, scheme, values) for scheme, values in computed.items()}
    checkpoint["state_dict"], checkpoint["optimizer_states"] = {}, []
    for name in ("hyper_parameters", "hparams_name", "hparams_type"):  # no plain data, and of no use here
        checkpoint.pop(name, None)


def _computed(bank: Bank) -> dict[str, dict[str, torch.Tensor]]:
    return {key: {"tensor": tensor} for key, tensor in bank.kept().items() if key not in bank.trained()}


@torch.no_grad()
def on_load_checkpoint(model, checkpoint: dict[str, Any]) -> None:
    """Take this rank's part of every whole tensor and optimizer state, once all of them are known to fit.

    Raises:
        UsageError: one does not, or was trained against other frozen tensors; then nothing was changed.
    """
    checked = Checked(model.trainer.ckpt_path, checkpoint)
    checked.names(KEY, checkpoint[KEY], model.adaptations)
    rules = checkpoint.get(RULES, {})
    checked.alike(rules, {}, RULES)
    for scheme in checkpoint[KEY]:
        rule = rules.get(scheme, drawing_by_torch.RULE)
        checked.alike(rule, drawing_by_torch.RULE, f"{RULES}.{scheme}")
        _check_rule(model, scheme, rule)
    _check(model, checked)
    for scheme, saved in checkpoint[KEY].items():
        mine = {}
        for key, (_, tensor) in model.adaptations[scheme].bank.trained().items():
            mine[key] = {name: part(model, scheme, key, value) for name, value in saved[key].items()}
            tensor.copy_(mine[key]["tensor"])
        restore(model, scheme, mine)
        for key, named in _computed(model.adaptations[scheme].bank).items():
            named["tensor"].copy_(part(model, scheme, key, checkpoint[COMPUTED][scheme][key]["tensor"]))
    groups = inner(model.trainer).param_groups
    for scheduler in checkpoint["lr_schedulers"]:
        for name in ("base_lrs", "_last_lr"):  # of every group, and all alike; there may be another number here
            scheduler[name] = scheduler[name][:1] * len(groups)


def _check(model, checked: Checked) -> None:
    checked.progress(model.trainer)
    groups = inner(model.trainer).param_groups
    dtypes = {tensor.dtype for group in groups for tensor in group["params"]}
    for scheme, adapted in model.adaptations.items():
        variant = adapted.bank.variant
        specs = specs_of(variant, sites(variant.config, model.cfg))
        shapes = {key: spec.shape(site, variant.rank) for key, (spec, site) in specs.items() if spec.trained}
        computed = {key: (spec, site) for key, (spec, site) in specs.items() if spec.stored and not spec.trained}
        saved = checked.content.get(COMPUTED, {}).get(scheme, {})
        checked.names(f"{COMPUTED}.{scheme}", saved, computed)
        for key, (spec, site) in computed.items():
            checked.names(f"{COMPUTED}.{scheme}.{key}", saved[key], ["tensor"])
            checked.tensor(f"{COMPUTED}.{scheme}.{key}", saved[key]["tensor"], spec.shape(site, variant.rank))
        mine = [settings_of(group) for group in groups if group.get("adapter", scheme) == scheme]
        checked.whole(f"{KEY}.{scheme}", checked.content[KEY][scheme], shapes, mine or [{}], dtypes)


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
    for beside in {path.parent for path in folder.rglob("*-last.ckpt")}:  # NeMo's own have a folder for each rank
        found = sorted(beside.glob("*-last.ckpt"), key=_step)
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
    """NLPDDPStrategy's, for one file; and its own ones without running what is in them.

    Raises:
        UsageError: a checkpoint that is cut off, was changed, could run code, does not fit, or is of another run.
    """
    model = self.lightning_module
    checkpoint = _loaded(self, stock, Path(checkpoint_path), *args, **kwargs)
    checked = Checked(checkpoint_path, checkpoint)
    for callback in model.trainer.callbacks:
        if hasattr(callback, "check_continues"):  # before anything is taken from it
            callback.check_continues(checkpoint, checkpoint_path, model.trainer.max_steps)
    checked.progress(model.trainer)
    _take_along(checkpoint, Path(checkpoint_path), model.trainer.checkpoint_callback)
    if Path(checkpoint_path).is_dir():
        for name in ("state_dict", "optimizer_states"):
            checked.finite(checkpoint.get(name), name)
    elif not only_ours(model):
        if KEY in checkpoint:
            raise checked.error(f"{KEY} is not one of this run's")
        checked.state_dict(model.state_dict())
        if not model.use_mcore_dist_optim:
            checked.optimizer(model.trainer.optimizers[0])
    elif KEY not in checkpoint:
        raise checked.error(f"{KEY} is missing")
    else:  # what is in these, Lightning would take as it is
        for name, empty in (("state_dict", {}), ("optimizer_states", [])):
            if type(checkpoint.get(name)) is not type(empty) or len(checkpoint[name]):
                raise checked.error(f"{name} is not empty, as it is beside {KEY}")
    return checkpoint


def _take_along(checkpoint: dict[str, Any], path: Path, saver) -> None:
    """A run's folder may have been moved: Lightning would forget its best checkpoints, which are beside this one."""
    if saver is None or path.parent.resolve() != Path(saver.dirpath).resolve():
        return

    def here(kept: str) -> str:
        return kept and os.path.join(saver.dirpath, os.path.basename(kept))

    for state in checkpoint["callbacks"].values():
        if "best_k_models" in state:
            state["dirpath"] = saver.dirpath
            state["best_k_models"] = {here(kept): score for kept, score in state["best_k_models"].items()}
            for kind in ("best_model_path", "kth_best_model_path", "last_model_path"):
                state[kind] = here(state[kind])


def _loaded(strategy, stock, path: Path, *args, **kwargs) -> dict[str, Any]:
    if path.is_dir():
        check_folder(Folder(path, "checkpoint"))
        return stock(strategy, str(path), *args, **kwargs)
    file = path if only_ours(strategy.lightning_module) else Path(inject_model_parallel_rank(path))
    if not file.is_file():
        return stock(strategy, path, *args, **kwargs)
    if is_trusted(file):
        with as_it_is(file):
            return strategy.checkpoint_io.load_checkpoint(file)
    return _read(file)


def _read(path: Path) -> dict[str, Any]:
    try:
        checkpoint = load(path, intact=True)
    except Refused as error:
        way_out = f"{error}; put another checkpoint in its place, or remove it to start again"
        raise with_digest(UsageError("checkpoint", str(path), way_out), path) from None
    return checkpoint


def remove_checkpoint(self, stock, filepath):
    """NLPDDPStrategy's, for one file."""
    if not (Path(filepath).is_file() and only_ours(self.lightning_module)):
        return stock(self, filepath)
    if self.is_global_zero:
        self.checkpoint_io.remove_checkpoint(filepath)
