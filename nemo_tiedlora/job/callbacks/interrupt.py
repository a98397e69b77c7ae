"""Ctrl-C, SIGTERM and SIGHUP end a run with a checkpoint that continues to the same result."""

import random
import signal
from typing import Any

import numpy
import torch
from lightning.pytorch import Callback
from megatron.core.tensor_parallel import get_cuda_rng_tracker


class Interrupted(Exception):
    """Training was asked to stop, and has saved where it was."""

    def __init__(self, signum: int, step: int):
        super().__init__(f"stopped by {signal.Signals(signum).name} after step {step}")
        self.signum, self.step = signum, step


class Interruptible(Callback):
    """Saves the last checkpoint and raises ``Interrupted`` at the end of the step in which a signal came.

    A validation that was due after that step is made up for first thing when the run continues; after the last step
    there is nothing else left, so training ends as it would have.

    The first signal only asks; a second one has the effect that it has before training, where there is nothing to save
    yet. All ranks stop at the same step.

    Every step begins with the random number generators where the step before left them, in a checkpoint too: whatever
    is in between (validation, new data loaders) also draws, and not the same in every process. So dropout goes on as it
    would have, whichever checkpoint a run continues from.
    """

    def __init__(self):
        self._signum = 0
        self._previous = {}
        self._states = None  # after the last step
        self._validation_due = False

    def on_train_start(self, trainer, model):
        for signum in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
            if signal.getsignal(signum) != signal.SIG_IGN:  # nohup, a job in the background
                self._previous[signum] = signal.signal(signum, self._ask)
        # Lightning would train on until the next validation.
        trainer.should_stop |= any(
            stopper.wait_count >= max(1, stopper.patience) for stopper in trainer.early_stopping_callbacks
        )

    def on_train_batch_start(self, trainer, model, batch, batch_idx):
        if self._states:
            set_random_states(self._states)

    def _ask(self, signum, frame):
        self._signum = signum
        self._put_back()

    def _put_back(self):
        for signum, handler in self._previous.items():
            signal.signal(signum, handler)
        self._previous = {}

    def on_train_end(self, trainer, model):
        self._put_back()

    def on_exception(self, trainer, model, exception):
        self._put_back()

    def on_train_batch_end(self, trainer, model, outputs, batch, batch_idx):
        self._states = random_states()
        signum = self._signum
        if trainer.world_size > 1:
            flag = torch.tensor([signum], device=model.device)
            torch.distributed.all_reduce(flag, op=torch.distributed.ReduceOp.MAX)
            signum = int(flag)
        if signum and trainer.global_step < trainer.max_steps:
            loop, saver = trainer.fit_loop, trainer.checkpoint_callback
            self._validation_due = loop.epoch_loop._should_check_val_fx(loop._data_fetcher)
            if saver is not None:
                saver._save_last_checkpoint(trainer, saver._monitor_candidates(trainer))
            raise Interrupted(signum, trainer.global_step)

    def on_save_checkpoint(self, trainer, model, checkpoint):
        states = [self._states or random_states()]
        if trainer.world_size > 1:
            (mine,), states = states, [None] * trainer.world_size
            torch.distributed.all_gather_object(states, mine)
        checkpoint["random_states"] = states
        checkpoint["validation_due"] = self._validation_due

    def on_load_checkpoint(self, trainer, model, checkpoint):
        states = checkpoint.get("random_states") or []
        # Another number of ranks draws other random numbers, whatever it starts from.
        self._states = states[trainer.global_rank] if len(states) == trainer.world_size else None
        # NeMo's loader of a resumed run holds the remaining batches only, but Lightning would count the done ones
        # against it, end the epoch early and then repeat the data.
        progress = checkpoint["loops"]["fit_loop"]["epoch_loop.batch_progress"]
        progress["current"] = dict.fromkeys(progress["current"], 0)
        progress["is_last_batch"] = False
        trainer.fit_loop.epoch_loop.validation_due = checkpoint.get("validation_due", False)


def random_states() -> dict[str, Any]:
    """Where every random number generator of this process is, as plain data and tensors."""
    kind, keys, *rest = numpy.random.get_state()
    return {
        "python": random.getstate(),
        "numpy": (kind, keys.tolist(), *rest),
        "torch": torch.get_rng_state(),
        "cuda": torch.cuda.get_rng_state(),
        "megatron": get_cuda_rng_tracker().get_states(),
    }


def set_random_states(states: dict[str, Any]) -> None:
    """Put the generators back to where ``random_states`` found them."""
    random.setstate(states["python"])
    numpy.random.set_state(states["numpy"])
    torch.set_rng_state(states["torch"])
    torch.cuda.set_rng_state(states["cuda"])
    get_cuda_rng_tracker().set_states(states["megatron"])
