"""Trains toy models in real processes over gloo, and brings back what every rank saw."""

from __future__ import annotations

import os
from pathlib import Path

import forked
import torch
import toy


def run(folder: Path, cases: dict[str, dict], files: dict[str, str], processes: int, layout: dict) -> dict:
    """Train every case under one layout.

    Args:
        cases: name → {"peft": section, "steps": number, "model": overrides}; and, if wanted, "precision", "load" (an
            adapter to start from), "checkpoint" (where and after how many steps to save one), "resume" (one to go on
            from) and "save" (where to save the adapter).
        layout: overrides of the model section.

    Returns:
        name → one record per rank: losses, grad_norms, tensors by key, collectives of the last step, and for DynaLoRA
        its history.
    """
    folder.mkdir(parents=True)
    forked.ranks(processes, rank_of, folder, cases, files, layout)
    ranks = [torch.load(folder / f"{rank}.pt", weights_only=False) for rank in range(processes)]
    return {name: [records[name] for records in ranks] for name in cases}


class Collectives:
    """Counts collectives of tensors by name and shape, while entered."""

    NAMES = ("all_reduce", "all_gather_into_tensor", "reduce_scatter_tensor", "broadcast", "all_gather")

    def __enter__(self):
        self.seen, self.originals = [], {name: getattr(torch.distributed, name) for name in self.NAMES}
        for name, original in self.originals.items():
            setattr(torch.distributed, name, self._counting(name, original))
        return self

    def _counting(self, name, original):
        def call(tensor, *args, **kwargs):
            shape = tuple(tensor.shape) if isinstance(tensor, torch.Tensor) else None
            self.seen.append((name, shape))
            return original(tensor, *args, **kwargs)

        return call

    def __exit__(self, *_):
        for name, original in self.originals.items():
            setattr(torch.distributed, name, original)


def train(case: dict, files: dict, layout: dict, scratch: Path) -> dict:
    """One case on this rank."""
    import lightning.pytorch as pl

    from nemo_tiedlora.job.callbacks.interrupt import Interruptible

    config = toy.finetuning_config(
        Path(files["base"]), Path(files["train"]), Path(files["validation"]), case["peft"],
        **(layout | case.get("model", {})),
    )  # fmt: skip
    for split in ("train_ds", "validation_ds"):
        config.model.data[split].index_mapping_dir = str(scratch)
    config.model.data.validation_ds.metric.name = "loss"
    steps = case["steps"]
    record = {"losses": [], "grad_norms": [], "collectives": []}
    counting = Collectives()

    class Watch(pl.Callback):
        def on_train_start(self, trainer, model):
            if model.use_mcore_dist_optim:  # NeMo does not log its norm
                distributed = trainer.optimizers[0].mcore_optimizer
                step = distributed.step

                def told():
                    done = step()
                    record["grad_norms"].append(float(done[1]))
                    return done

                distributed.step = told

        def on_train_batch_start(self, trainer, model, batch, number):
            if trainer.global_step == steps - 1:
                counting.__enter__()

        def on_train_batch_end(self, trainer, model, outputs, batch, number):
            if trainer.global_step == steps:
                counting.__exit__()
                record["collectives"] = counting.seen
            record["losses"].append(float(trainer.callback_metrics["reduced_train_loss"]))
            if trainer.global_step == case.get("checkpoint", (None, 0))[1]:
                trainer.save_checkpoint(case["checkpoint"][0])
            if not model.use_mcore_dist_optim:
                record["grad_norms"].append(float(trainer.callback_metrics.get("grad_norm", 0)))

    precision = case.get("precision", 32)
    config.trainer.precision = precision
    world = int(os.environ.get("WORLD_SIZE", 1))
    trainer = toy.trainer(
        config.model, devices=world, max_steps=steps, val_check_interval=steps, num_sanity_val_steps=0,
        precision=precision,
    )  # fmt: skip
    trainer.check_val_every_n_epoch = None  # validate by steps of the whole run, not of an epoch
    trainer.callbacks.append(Watch())
    if "checkpoint" in case or "resume" in case:
        trainer.callbacks.append(Interruptible())
    model = toy.finetuning_model(config, trainer, load=case.get("load"))
    if steps:
        trainer.ckpt_path = case.get("resume")  # as NeMo's experiment manager does it
        trainer.fit(model)
    if "save" in case:
        model.setup_complete = True  # from here on NeMo saves the adapter, not the model
        model.save_to(case["save"])
    for adapted in getattr(model, "adaptations", {}).values():
        record["tensors"] = {
            key: tensor.detach().float().clone() for key, tensor in adapted.bank.named_tensors().items()
        }
        if history := adapted.bank.variant.history():
            record["history"] = history
    return record


def rank_of(folder: Path, cases: dict, files: dict, layout: dict) -> None:
    """All cases on this rank."""
    from nemo_tiedlora import platform, register

    with platform.host():
        register()
        records = {name: train(case, files, layout, folder) for name, case in cases.items()}
    torch.save(records, folder / f"{os.environ['RANK']}.pt")
