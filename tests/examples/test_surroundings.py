"""The script on a machine with habits of its own: a scheduler beside it, no home, a narrow screen, another clock."""

import os
import subprocess
import sys
from pathlib import Path

import pytest
import toy

SCRIPT = Path(__file__).parents[2] / "examples" / "megatron_gpt_finetuning.py"


@pytest.mark.slow
def test_what_else_is_on_the_machine_does_not_show(tmp_path):
    for name in ("srun", "sbatch", "scontrol"):
        (tmp_path / name).write_text("#!/bin/sh\nexit 1\n")
        (tmp_path / name).chmod(0o755)
    surroundings = {
        "PATH": f"{tmp_path}:{os.environ['PATH']}",
        "HOME": str(tmp_path / "nobody"),
        "SLURM_JOB_ID": "7",
        "CUDA_VISIBLE_DEVICES": "",
        "COLUMNS": "40",
        "TERM": "dumb",
        "LC_ALL": "C",
        "TZ": "Asia/Kathmandu",
    }
    steps = ("trainer.max_steps=2", "trainer.val_check_interval=2", "trainer.log_every_n_steps=1")
    done = subprocess.run(
        [sys.executable, SCRIPT, "model.peft.peft_scheme=tied_lora", *steps],
        cwd=tmp_path, env=toy.FRESH | surroundings, capture_output=True, text=True, umask=0o077,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr[-2000:]
    assert "NeMo" not in done.stdout + done.stderr and "Warning" not in done.stderr, done.stderr[-2000:]
    assert (tmp_path / done.stdout.splitlines()[-1]).is_file()
