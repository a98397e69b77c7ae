"""How a run of the fine-tuning script ends when it cannot go on: in one line, with what it had."""

import json
import signal
import time
from pathlib import Path

import forked
import pytest

SCRIPT = Path(__file__).parents[2] / "examples" / "megatron_gpt_finetuning.py"
SHORT = (
    "trainer.max_steps=12",
    "trainer.val_check_interval=2",
    "trainer.limit_val_batches=1",
    "model.global_batch_size=8",
    "model.micro_batch_size=4",
    "model.data.validation_ds.global_batch_size=8",
    "model.data.validation_ds.micro_batch_size=4",
    "model.data.validation_ds.metric.name=loss",
    "exp_manager.explicit_log_dir=runs/run",
)
pytestmark = pytest.mark.slow


def until(condition, *jobs, timeout=300):
    deadline = time.monotonic() + timeout
    while not condition():
        assert time.monotonic() < deadline and all(job.poll() is None for job in jobs), [j.finish() for j in jobs]
        time.sleep(0.02)


def checkpoints(folder, kind="*-last.ckpt"):
    return sorted(path.relative_to(folder) for path in folder.rglob(kind))


@pytest.mark.parametrize("scheme", ["tied_lora", pytest.param("lora", marks=pytest.mark.thorough)])
def test_a_run_that_diverges_keeps_the_last_good_checkpoint(tmp_path, scheme):
    import torch
    from torch.utils._pytree import tree_leaves

    diverging = ("model.optim.lr=1e6", "trainer.val_check_interval=1", f"model.peft.peft_scheme={scheme}")
    code, _, err = forked.script(SCRIPT, *SHORT, *diverging, cwd=tmp_path)
    lines = [line for line in err.splitlines() if not line.startswith("step ")]
    assert code == 1 and len(lines) == 1, err[-2000:]
    assert lines[0].startswith("error: the run diverged: ") and "(it is 1000000.0)" in lines[0]
    (kept,) = checkpoints(tmp_path / "runs", "*-last*")
    assert lines[0].endswith(f"runs/{kept}")
    for path in checkpoints(tmp_path / "runs", "*.ckpt"):
        saved = torch.load(tmp_path / "runs" / path, weights_only=False)
        weights = [
            value for value in tree_leaves([saved.get("adapters"), saved["state_dict"]]) if torch.is_tensor(value)
        ]
        assert weights and all(value.isfinite().all() for value in weights)
    for name in ("*.nemo", "summary.json", "*-unfinished"):
        assert not list((tmp_path / "runs").rglob(name))


@pytest.mark.thorough
@pytest.mark.parametrize("layout", [(), ("model.pipeline_model_parallel_size=2",)], ids=["DP2", "PP2"])
def test_all_ranks_of_a_run_that_diverges_end_together(tmp_path, layout):
    diverging = ("model.optim.lr=1e6", "trainer.devices=2", *layout)
    ends = [rank.finish() for rank in forked.torchrun(2, SCRIPT, *SHORT, *diverging, cwd=tmp_path)]
    assert [code for code, _, _ in ends] == [1, 1], ends[0][2][-2000:] + ends[1][2][-2000:]
    said = [line for _, _, err in ends for line in err.splitlines() if not line.startswith("step ")]
    assert len(said) == 1 and "the run diverged: " in said[0]  # the first rank says it for all
    assert not list(tmp_path.rglob("*.nemo")) and not list(tmp_path.rglob("summary.json"))


@pytest.mark.parametrize("victim", [1, pytest.param(0, marks=pytest.mark.thorough)])
def test_a_rank_that_is_killed_ends_the_others_and_the_job_continues(tmp_path, victim):
    ranks = forked.torchrun(2, SCRIPT, *SHORT, "trainer.devices=2", cwd=tmp_path)
    until(lambda: checkpoints(tmp_path) and not list(tmp_path.rglob("*-unfinished")), *ranks)
    ranks[victim].send_signal(signal.SIGKILL)
    code, _, err = ranks[1 - victim].finish(timeout=60)
    lines = [line for line in err.splitlines() if line and not line.startswith("step ")]
    assert code == 1, err[-2000:]
    assert lines == ["error: another rank of this job ended; the same command continues from the last checkpoint"]
    assert ranks[victim].finish()[0] == -signal.SIGKILL
    ends = [rank.finish() for rank in forked.torchrun(2, SCRIPT, *SHORT, "trainer.devices=2", cwd=tmp_path)]
    assert [code for code, _, _ in ends] == [0, 0], ends[0][2][-2000:] + ends[1][2][-2000:]
    assert "resuming from" in ends[0][1]
    summary = json.loads((tmp_path / ends[0][1].splitlines()[-1]).read_text())
    assert summary["steps"] == 12 and Path(summary["adapter"]).is_file()


def test_a_second_job_in_a_folder_says_so_and_any_signal_before_training_is_one_line(tmp_path):
    first = forked.Script(SCRIPT, *SHORT, cwd=tmp_path)
    held = tmp_path / "runs" / "run" / ".lock" / "job"
    until(lambda: held.exists() and held.read_text(), first)
    code, out, err = forked.script(SCRIPT, *SHORT, cwd=tmp_path)
    assert code == 2 and not out and err.count("\n") == 1
    assert f"exp_manager.exp_dir='runs/run': another job is running in it ({held.read_text().strip()})" in err
    first.send_signal(signal.SIGHUP)
    code, _, err = first.finish()
    assert (code, err.count("\n")) == (128 + signal.SIGHUP, 1), err[-2000:]
    assert err.startswith("stopped by SIGHUP; ")
    evaluating = forked.Script(SCRIPT, *SHORT, cwd=tmp_path)
    until(lambda: list((tmp_path / "runs").rglob("*.idx.info")), evaluating)
    evaluating.send_signal(signal.SIGINT)
    code, _, err = evaluating.finish()
    assert (code, err.count("\n")) == (128 + signal.SIGINT, 1), err[-2000:]
    assert not checkpoints(tmp_path, "*.ckpt*") and not checkpoints(tmp_path, "*.nemo")
    beginning = forked.Script(SCRIPT, *SHORT, cwd=tmp_path)
    time.sleep(0.05)
    beginning.send_signal(signal.SIGTERM)
    code, _, err = beginning.finish()
    assert code in (128 + signal.SIGTERM, -signal.SIGTERM), err[-2000:]  # the latter: before Python ran the script


def test_new_runs_at_once_have_folders_of_their_own(tmp_path, monkeypatch):
    from omegaconf import OmegaConf

    from nemo_tiedlora.job import finetune

    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(finetune, "_runs", lambda root: {})  # as if all had looked before any made its own
    manager = {"explicit_log_dir": None, "exp_dir": None, "name": "run", "resume_if_exists": True}
    found = [finetune.choose_folder(OmegaConf.create({"exp_manager": manager}), "text") for _ in range(3)]
    assert [path.name for path in found] == ["run-001", "run-002", "run-003"]
