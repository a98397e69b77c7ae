"""What a person sees while a job trains."""

import re
from types import SimpleNamespace

import pytest
from lightning.pytorch.trainer.states import TrainerFn
from rich.console import Console

from nemo_tiedlora.job.callbacks import progress
from nemo_tiedlora.job.callbacks.progress import ProgressBar


def train(bar, metric, steps=4):
    """Validate, train with a validation after every other step, and test, with numbers made up."""
    state = SimpleNamespace(fn=TrainerFn.VALIDATING)
    trainer = SimpleNamespace(
        is_global_zero=True, max_steps=steps, global_step=0, callback_metrics={}, state=state,
        num_val_batches=[3], num_test_batches=[3],
    )  # fmt: skip

    def evaluate(start, batch_end, end):
        start(trainer, None)
        for batch in range(3):
            batch_end(trainer, None, None, None, batch)
        trainer.callback_metrics[f"validation_{metric}"] = 0.25 * trainer.global_step
        end(trainer, None)

    evaluate(bar.on_validation_start, bar.on_validation_batch_end, bar.on_validation_end)
    state.fn = TrainerFn.FITTING
    bar.on_train_start(trainer, None)
    for step in range(1, steps + 1):
        bar.on_train_batch_start(trainer, None, None, step)
        trainer.global_step = step
        trainer.callback_metrics |= {"reduced_train_loss": 3 / step, "lr": 1e-3}
        bar.on_train_batch_end(trainer, None, None, None, step)
        if step % 2 == 0:
            evaluate(bar.on_validation_start, bar.on_validation_batch_end, bar.on_validation_end)
    bar.on_train_end(trainer, None)
    state.fn = TrainerFn.TESTING
    evaluate(bar.on_test_start, bar.on_test_batch_end, bar.on_test_end)


def test_lines_name_the_losses_apart_and_end_with_the_last_validation(capfd, monkeypatch):
    monkeypatch.setattr(progress, "LINE_EVERY", 0)
    bar = ProgressBar("validation_loss")
    bar.console = Console(force_terminal=False)
    train(bar, "loss")
    *_, before_last, last = capfd.readouterr().err.splitlines()
    assert re.fullmatch(r"step 4/4  train loss 0\.7500  lr 1\.0e-03  \d+ ms/step  validation loss 0\.5000", before_last)
    assert re.fullmatch(r"step 4/4  train loss 0\.7500  lr 1\.0e-03  \d+ ms/step  validation loss 1\.0000", last)


@pytest.mark.parametrize(("width", "lines"), [(80, 2), (120, 1)])
def test_a_terminal_shows_every_fact_whole(tmp_path, width, lines):
    bar = ProgressBar("validation_exact_string_match")
    with (tmp_path / "screen").open("w+") as screen:
        bar.console = Console(file=screen, force_terminal=True, width=width, color_system=None)
        train(bar, "exact_string_match", steps=300)
        screen.seek(0)
        shown = re.sub(r"\x1b\[[\d?]*[a-zA-Z]", "", screen.read())
    assert "validate" in shown and "test" in shown
    last = [line.strip() for line in re.split(r"[\r\n]+", shown[: shown.rindex("test ")]) if line.strip()][-lines:]
    assert "300/300" in last[0] and "train loss 0.0100  lr 1.0e-03" in last[0] and "ms/step" in last[0]
    assert last[-1].endswith("validation exact_string_match 75.0000") and max(map(len, last)) <= width
