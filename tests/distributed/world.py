"""Trains toy models in real processes over gloo, and brings back what every rank saw.

As a script it is their parent: it imports NeMo once, and forks the ranks of every job that standard input names.
"""

from __future__ import annotations

import atexit
import functools
import json
import os
import select
import signal
import socket
import subprocess
import sys
import traceback
from pathlib import Path

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
    job = {"cases": cases, "files": {name: str(path) for name, path in files.items()}, "layout": layout}
    (folder / "job.json").write_text(json.dumps(job))
    parent = _parent()
    print(processes, folder, file=parent.stdin, flush=True)
    answered, _, _ = select.select([parent.stdout], [], [], 900)
    answer = parent.stdout.readline().strip() if answered else "no answer in 15 minutes"
    if answer != "done":
        _parent.cache_clear()
        os.killpg(parent.pid, signal.SIGKILL)
    said = "\n".join(path.read_text() for path in sorted(folder.glob("*.err")))
    assert answer == "done", said[-6000:] or answer or "the parent of the ranks ended"
    ranks = [torch.load(folder / f"{rank}.pt", weights_only=False) for rank in range(processes)]
    return {name: [records[name] for records in ranks] for name in cases}


@functools.cache
def _parent() -> subprocess.Popen:
    """The parent of all ranks, started when first needed; it ends with this process."""
    environment = toy.FRESH | {"PYTHONPATH": str(Path(toy.__file__).parent), "OMP_NUM_THREADS": "1"}
    pipe = subprocess.PIPE
    parent = subprocess.Popen(
        [sys.executable, __file__], env=environment, stdin=pipe, stdout=pipe, stderr=subprocess.DEVNULL, text=True,
        start_new_session=True,
    )  # fmt: skip
    atexit.register(parent.kill)
    return parent


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

    from nemo_tiedlora.nemo.interrupt import Interruptible

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
    for adapted in model.__dict__.get("adaptations", {}).values():
        record["tensors"] = {
            key: tensor.detach().float().clone() for key, tensor in adapted.bank.named_tensors().items()
        }
        if hasattr(adapted.bank.variant, "history"):
            record["history"] = adapted.bank.variant.history()
    return record


def rank_of(folder: Path) -> None:
    """All cases of a job on this rank."""
    job = json.loads((folder / "job.json").read_text())
    records = {}
    for name, case in job["cases"].items():
        records[name] = train(case, job["files"], job["layout"], folder)
    torch.save(records, folder / f"{os.environ['RANK']}.pt")


def fork(folder: Path, rank: int, processes: int, port: int) -> int:
    """Start one rank, with the environment that torchrun gives it; its process number."""
    child = os.fork()
    if child:
        return child
    names = {"RANK": rank, "LOCAL_RANK": rank, "WORLD_SIZE": processes, "LOCAL_WORLD_SIZE": processes}
    os.environ |= {name: str(value) for name, value in names.items()}
    os.environ |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port), "TORCHELASTIC_RUN_ID": folder.name}
    os.environ |= {"GROUP_RANK": "0"}
    code = 1
    try:
        rank_of(folder)
        code = 0
    except BaseException:
        (folder / f"{rank}.err").write_text(f"rank {rank}: {traceback.format_exc()}")
    finally:
        os._exit(code)


def main() -> None:
    """Serve jobs until standard input ends."""
    from nemo_tiedlora import platform, register

    answers = os.fdopen(os.dup(1), "w", buffering=1)
    os.dup2(2, 1)  # NeMo prints
    torch.set_num_threads(1)
    with platform.host():
        register()
        for line in sys.stdin:
            processes, folder = line.strip().split(" ", 1)
            with socket.socket() as free:
                free.bind(("127.0.0.1", 0))
                port = free.getsockname()[1]
            children = {fork(Path(folder), rank, int(processes), port) for rank in range(int(processes))}
            failed = 0
            while children:
                child, status = os.wait()
                children.discard(child)
                if status and not failed:
                    failed = status
                    for other in children:  # they would wait for it
                        os.kill(other, signal.SIGKILL)
            print(f"failed with status {failed}" if failed else "done", file=answers)


if __name__ == "__main__":
    main()
