"""A progress bar with what a person watches: the loss on the training rows, learning rate, step time, and the metric
on the validation rows."""

import sys
import time

from lightning.pytorch import Callback
from lightning.pytorch.trainer.states import TrainerFn
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn
from rich.table import Column

#: Reading a metric waits for the device, so a bar reads it at most this often (seconds).
REFRESH = 0.25
#: Seconds between lines where output is not a terminal.
LINE_EVERY = 10.0


class ProgressBar(Callback):
    """Shows training, validation and testing; on a terminal as bars, elsewhere training as a line every few seconds.

    Args:
        metric: name of the validation metric in Lightning's metrics, e.g. ``validation_loss``.
    """

    def __init__(self, metric: str):
        self.metric = metric
        self.console = Console(stderr=True)
        self._progress = self._training = self._evaluation = None
        self._shown = self._step_started = 0.0
        self._step_seconds = None

    def _start(self, trainer) -> None:
        if self._progress is None and trainer.is_global_zero:
            self._progress = Progress(
                TextColumn("{task.description}"),
                BarColumn(bar_width=10),
                MofNCompleteColumn(),
                TimeRemainingColumn(),
                TextColumn("{task.fields[facts]}", table_column=Column(no_wrap=False)),  # two lines where narrow
                console=self.console,
                disable=not self.console.is_terminal,
            )
            self._progress.start()

    def _stop(self) -> None:
        if self._progress is not None:
            self._progress.stop()
            self._progress = self._training = self._evaluation = None

    def on_train_start(self, trainer, model):
        self._start(trainer)
        if self._progress is not None:
            self._training = self._progress.add_task(
                "train", total=trainer.max_steps, completed=trainer.global_step, facts=""
            )

    def on_train_batch_start(self, trainer, model, batch, batch_idx):
        self._step_started = time.perf_counter()

    def on_train_batch_end(self, trainer, model, outputs, batch, batch_idx):
        now = time.perf_counter()
        seconds = now - self._step_started
        self._step_seconds = seconds if self._step_seconds is None else 0.9 * self._step_seconds + 0.1 * seconds
        if now - self._shown > (REFRESH if self.console.is_terminal else LINE_EVERY):
            self._show(trainer)

    def _show(self, trainer) -> None:
        if self._training is None or self._step_seconds is None:
            return
        self._shown = time.perf_counter()
        facts = self._facts(trainer)
        self._progress.update(self._training, completed=trainer.global_step, facts=facts)
        if not self.console.is_terminal:
            print(f"step {trainer.global_step}/{trainer.max_steps}  {facts}", file=sys.stderr, flush=True)

    def _facts(self, trainer) -> str:
        metrics = trainer.callback_metrics
        facts = []
        for name, shown, form in (
            ("reduced_train_loss", "train loss", ".4f"),
            ("lr", "lr", ".1e"),
            (self.metric, self.metric.replace("_", " ", 1), ".4f"),
        ):
            if name in metrics:
                facts.append(f"{shown} {float(metrics[name]):{form}}")
        # The metric comes last: where the terminal is 80 columns wide, it has a line of its own.
        facts.insert(2, f"{self._step_seconds * 1e3:.0f} ms/step")
        return "  ".join(facts)

    def on_validation_start(self, trainer, model):
        self._start_evaluation(trainer, "validate", trainer.num_val_batches)

    def on_test_start(self, trainer, model):
        self._start_evaluation(trainer, "test", trainer.num_test_batches)

    def _start_evaluation(self, trainer, shown: str, batches: list[int | float]) -> None:
        self._start(trainer)
        if self._progress is not None:
            total = sum(number for number in batches if number != float("inf"))
            self._evaluation = self._progress.add_task(shown, total=total or None, facts="")

    def on_validation_batch_end(self, trainer, model, outputs, batch, batch_idx, dataloader_idx=0):
        if self._evaluation is not None:
            self._progress.advance(self._evaluation)

    on_test_batch_end = on_validation_batch_end

    def on_validation_end(self, trainer, model):
        if self._evaluation is not None:
            self._progress.remove_task(self._evaluation)
            self._evaluation = None
        if trainer.state.fn != TrainerFn.FITTING:
            self._stop()

    on_test_end = on_validation_end

    def on_train_end(self, trainer, model):
        self._show(trainer)  # with what the last validation found
        self._stop()

    def on_exception(self, trainer, model, exception):
        self._stop()
