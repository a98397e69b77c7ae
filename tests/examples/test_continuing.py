"""What is left of a run when it is stopped, and what a rerun makes of it."""

import json
import random
import shutil
from pathlib import Path

import forked
import pytest
import torch

HERE = Path(__file__).parent
SCRIPT = HERE.parents[1] / "examples" / "megatron_gpt_finetuning.py"
pytestmark = pytest.mark.slow

STEPS = 6
#: Accumulation, dropout, validations with generated text, rows that fill neither a batch nor an epoch.
RUN = (
    f"trainer.max_steps={STEPS}",
    "trainer.val_check_interval=3",
    "trainer.limit_val_batches=1",
    "exp_manager.exp_dir=runs",
    "exp_manager.name=run",
    "model.data.train_ds.file_names=[train.jsonl]",
    "model.data.validation_ds.file_names=[validation.jsonl]",
    "model.data.train_ds.max_seq_length=48",
    "model.data.validation_ds.metric.name=exact_string_match",
    "model.data.validation_ds.tokens_to_generate=2",
    "model.global_batch_size=8",
    "model.micro_batch_size=2",
    "model.optim.lr=1e-2",
)
METHODS = {
    "TL6": ("model.peft.tied_lora_tuning.dropout=0.1",),
    "DynaLoRA": (
        "model.peft.peft_scheme=dyna_lora",
        "model.peft.dyna_lora_tuning.dropout=0.1",
        "model.peft.dyna_lora_tuning.period=2",
        "model.peft.dyna_lora_tuning.optimizer=local",
    ),
    "CondLoRA": ("model.peft.peft_scheme=cond_lora", "model.peft.cond_lora_tuning.dropout=0.1"),
}


def rows(path: Path, count: int, seed: int) -> Path:
    """Rows as of the built-in task."""
    from nemo_tiedlora.embedded.tasks import rows

    path.write_text("".join(json.dumps(row) + "\n" for row in rows("before", "train", count, seed)))
    return path


def folder(path: Path) -> Path:
    path.mkdir(parents=True)
    rows(path / "train.jsonl", 13, 0)
    rows(path / "validation.jsonl", 3, 1)
    return path


def run(path: Path, *overrides, moment="-", signal="-"):
    return forked.script(HERE / "watched.py", moment, signal, SCRIPT, *RUN, *overrides, cwd=path)


def done(path: Path) -> dict:
    """The summary of a run whose adapter is there."""
    summary = json.loads((path / "runs" / "run" / "summary.json").read_text())
    assert Path(summary["adapter"]).is_file()
    return summary


def adapter(path: Path) -> bytes:
    return Path(done(path)["adapter"]).read_bytes()


def checkpoint(path: Path) -> dict:
    (last,) = (path / "runs").rglob("*-last.ckpt")
    return torch.load(last, weights_only=False)["adapters"]


def assert_same(ours, reference):
    """Every tensor and every optimizer state, to the bit."""
    if isinstance(reference, dict):
        assert ours.keys() == reference.keys()
        for name, value in reference.items():
            assert_same(ours[name], value)
    else:
        assert torch.equal(ours, reference) if isinstance(reference, torch.Tensor) else ours == reference


@pytest.fixture(scope="module")
def undisturbed(tmp_path_factory):
    """Runs that nothing stopped, by method, made when asked for."""
    made = {}

    def of(method: str) -> Path:
        if method not in made:
            made[method] = folder(tmp_path_factory.mktemp("runs") / "whole")
            code, _, err = run(made[method], *METHODS[method])
            assert code == 0, err[-2000:]
        return made[method]

    return of


def continues(path, undisturbed, method, moment, signal, code):
    stopped, out, err = run(path, *METHODS[method], moment=moment, signal=signal)
    assert stopped == code, err[-2000:]
    assert not (path / "runs" / "run" / "summary.json").exists()
    code, out, err = run(path, *METHODS[method])
    assert code == 0, err[-2000:]
    whole = undisturbed(method)
    assert_same(checkpoint(path), checkpoint(whole))
    assert adapter(path) == adapter(whole)
    return out


@pytest.mark.parametrize(
    ("method", "moment", "signal", "code"),
    [
        ("TL6", "step=2", "SIGTERM", 143),  # a validation is due
        ("DynaLoRA", "step=3", "SIGHUP", 129),
        pytest.param("CondLoRA", "step=0", "SIGINT", 130, marks=pytest.mark.thorough),
        pytest.param("TL6", "step=4", "SIGINT", 130, marks=pytest.mark.thorough),
        pytest.param("DynaLoRA", "step=4", "SIGKILL", -9, marks=pytest.mark.thorough),
    ],
)
def test_a_stopped_run_continues_to_the_same_bits(tmp_path, undisturbed, method, moment, signal, code):
    continues(folder(tmp_path / "cut"), undisturbed, method, moment, signal, code)


@pytest.mark.thorough
@pytest.mark.parametrize("number", range(10))
def test_any_signal_at_any_step(tmp_path, undisturbed, number):
    draw = random.Random(number)
    signal, code = draw.choice([("SIGTERM", 143), ("SIGINT", 130), ("SIGHUP", 129)])
    method, step = draw.choice(list(METHODS)), draw.randrange(STEPS - 1)
    continues(folder(tmp_path / "cut"), undisturbed, method, f"step={step}", signal, code)


@pytest.mark.thorough
def test_a_signal_in_the_last_step_stops_nothing(tmp_path, undisturbed):
    path = folder(tmp_path / "cut")
    code, _, err = run(path, *METHODS["TL6"], moment=f"step={STEPS - 1}", signal="SIGTERM")
    assert code == 0, err[-2000:]
    assert adapter(path) == adapter(undisturbed("TL6"))


@pytest.mark.parametrize("moment", ["export", pytest.param("summary", marks=pytest.mark.thorough)])
def test_a_rerun_finishes_what_was_killed_after_the_last_step(tmp_path, undisturbed, moment):
    path = folder(tmp_path / "cut")
    out = continues(path, undisturbed, "TL6", moment, "SIGKILL", -9)
    assert "resuming from" in out
    assert done(path)["steps"] == STEPS
    watched = json.loads((path / "watched-0.json").read_text())
    assert not watched["losses"]  # nothing was trained again


def test_a_rerun_of_a_finished_run_says_so(undisturbed):
    path = undisturbed("TL6")
    written = (path / "runs" / "run" / "summary.json").stat().st_mtime_ns
    code, out, err = run(path, *METHODS["TL6"])
    assert code == 0, err[-2000:]
    assert out.startswith("already finished, after 6 steps\n") and out.splitlines()[-1] == "runs/run/summary.json"
    assert (path / "runs" / "run" / "summary.json").stat().st_mtime_ns == written


def test_a_step_consumes_its_rows_in_the_pieces_asked_for(undisturbed):
    path = undisturbed("TL6")
    code, _, err = run(path, *METHODS["TL6"], "exp_manager.exp_dir=counted", "trainer.max_steps=4")
    assert code == 0, err[-2000:]
    watched = json.loads((path / "watched-0.json").read_text())
    assert watched["pieces"] == {str(step): [2] * 4 for step in range(4)}


def test_a_longer_run_is_the_one_that_was_long_from_the_start(tmp_path):
    """With a schedule of a length of its own nothing depends on where a run ends."""
    fixed = ("+model.optim.sched.max_steps=20", "trainer.val_check_interval=4")
    first, whole = folder(tmp_path / "first"), folder(tmp_path / "whole")
    for path, steps in ((first, 4), (first, 8), (whole, 8)):
        code, _, err = run(path, *METHODS["TL6"], *fixed, f"trainer.max_steps={steps}")
        assert code == 0, err[-2000:]
    assert done(first)["steps"] == 8
    assert_same(checkpoint(first), checkpoint(whole))
    assert adapter(first) == adapter(whole)


def test_a_moved_run_is_still_that_run(tmp_path, undisturbed):
    path = folder(tmp_path / "first")
    code, _, err = run(path, *METHODS["TL6"], moment="step=4", signal="SIGTERM")
    assert code == 143, err[-2000:]
    moved = path.rename(tmp_path / "moved")
    code, _, err = run(moved, *METHODS["TL6"])
    assert code == 0, err[-2000:]
    assert adapter(moved) == adapter(undisturbed("TL6"))  # of the third step, which is the best, and was saved before
    finished = moved.rename(tmp_path / "finished")
    code, out, err = run(finished, *METHODS["TL6"])
    assert code == 0 and out.startswith("already finished"), err[-2000:]


def test_a_run_that_has_no_checkpoint_yet_may_change(tmp_path):
    path = folder(tmp_path / "cut")
    code, _, err = run(path, *METHODS["TL6"], moment="step=0", signal="SIGKILL")
    assert code == -9, err[-2000:]
    code, _, err = run(path, *METHODS["TL6"], "model.optim.lr=2e-2", moment="step=1", signal="SIGTERM")
    assert code == 143, err[-2000:]
    again = ("exp_manager.resume_if_exists=false", "model.optim.lr=3e-2", "trainer.max_steps=1")
    code, out, err = run(path, *METHODS["TL6"], *again)
    assert code == 0, err[-2000:]
    assert Path(out.splitlines()[-1]).parent.parent == Path("runs/run")  # in a folder with the date in its name


def test_a_run_that_its_time_limit_ended_is_not_finished(tmp_path):
    path = folder(tmp_path / "cut")
    code, out, err = run(path, *METHODS["TL6"], "+exp_manager.max_time_per_run=00:00:00:00")
    assert code == 0, err[-2000:]
    assert "as exp_manager asked" in out and not (path / "runs" / "run" / "summary.json").exists()


def changed(path, tmp_path):
    """A copy of a run's folder in which the files' content may be changed."""
    return Path(shutil.copytree(path, tmp_path / "copy", symlinks=True))


def test_a_rerun_with_anything_else_is_refused_by_name(tmp_path, undisturbed):
    path = changed(undisturbed("TL6"), tmp_path)
    cases = {
        "model.peft.tied_lora_tuning.preset=TL5": "model.peft.tied_lora_tuning.preset='TL5'",
        "model.optim.lr=2e-2": "model.optim.lr=0.02",
    }
    for override, message in cases.items():
        code, out, err = run(path, *METHODS["TL6"], override)
        assert (code, out, err.count("\n")) == (2, "", 1), err[-2000:]
        assert message in err and "resume_if_exists=false" in err, err
    rows(path / "train.jsonl", 13, 5)
    code, out, err = run(path, *METHODS["TL6"])
    assert (code, out, err.count("\n")) == (2, "", 1), err[-2000:]
    assert "model.data.train_ds.file_names" in err and "other content" in err


def test_a_checkpoint_of_another_run_is_refused(tmp_path, undisturbed):
    path = changed(undisturbed("TL6"), tmp_path)
    here = path / "runs" / "run"
    (here / "summary.json").unlink()
    (last,) = here.rglob("*-last.ckpt")
    content = torch.load(last, weights_only=False)
    content["run"]["settings"]["model.seed"] = 5
    torch.save(content, last)
    code, _, err = run(path, *METHODS["TL6"])
    assert code == 2 and err.count("\n") == 1, err[-2000:]
    assert "model.seed=1234" in err and last.name in err
