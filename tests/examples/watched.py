"""`python watched.py MOMENT SIGNAL SCRIPT ARGUMENTS`: the script, sent a signal at a moment, or (none -) only watched.

A moment is `step=N` (while step N + 1 trains), `export` (when the adapter is about to be written) or `summary`. What it
does is left in `watched-RANK.json` of the working folder: by step, the rows of every piece that trained, and losses.
"""

import json
import os
import runpy
import signal
import sys
from pathlib import Path

from nemo_tiedlora.job import finetune
from nemo_tiedlora.job.callbacks import facts
from nemo_tiedlora.nemo import saved

moment, name, script, *arguments = sys.argv[1:]


def stop(now: str) -> None:
    if now == moment:
        os.kill(os.getpid(), signal.Signals[name])


class Watched(facts.Facts):
    pieces: dict[int, list[int]] = {}
    losses: dict[int, float] = {}

    def on_train_batch_start(self, trainer, model, batch, batch_idx):
        stop(f"step={trainer.global_step}")
        super().on_train_batch_start(trainer, model, batch, batch_idx)
        self.pieces[trainer.global_step] = self.now = []

    def on_train_batch_end(self, trainer, *args):
        super().on_train_batch_end(trainer, *args)
        self.losses[trainer.global_step - 1] = float(trainer.callback_metrics["reduced_train_loss"])

    def _count(self, module, args, kwargs):
        super()._count(module, args, kwargs)
        if module.training:
            self.now.append(len(kwargs["input_ids"] if "input_ids" in kwargs else args[0]))


def at(now: str, function):
    def first(*args, **kwargs):
        stop(now)
        return function(*args, **kwargs)

    return first


def summary(write_text):
    def write(path, text):
        if Path(path).name == "summary.json":
            stop("summary")
        write_text(path, text)

    return write


facts.Facts = Watched
saved.write = at("export", saved.write)
finetune.write_text = summary(finetune.write_text)
sys.argv = [script, *arguments]
sys.path[0] = str(Path(script).parent)
try:
    runpy.run_path(script, run_name="__main__")
finally:
    rank = os.environ.get("RANK", "0")
    Path(f"watched-{rank}.json").write_text(json.dumps({"pieces": Watched.pieces, "losses": Watched.losses}))
