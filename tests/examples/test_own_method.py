"""The method of docs/adding-a-method.md through every door, as the page says: the script, the commands, the suite."""

import json
import re
import subprocess
import sys
from pathlib import Path

import forked
import pytest
import toy

ROOT = Path(__file__).parents[2]
SCRIPT, GENERATOR = (ROOT / "examples" / f"megatron_gpt_{name}.py" for name in ("finetuning", "generate"))
TIEDLORA, SUITE = ("-m", "nemo_tiedlora.cli"), ("-m", "benchmark_suite")


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """With the page's file, and a variant of the suite."""
    path = tmp_path_factory.mktemp("own")
    page = (ROOT / "docs" / "adding-a-method.md").read_text()
    (path / "core.py").write_text(re.search(r"```python\n(.*?)```", page, re.DOTALL)[1])
    (path / "variants").mkdir()
    (path / "variants" / "core.yaml").write_text(
        "name: core\ndescription: The page's.\nscheme: core_lora\nsettings: {std_R: 0.5}\nranks: [4]\nlr: [1e-2]\n"
    )
    return path


def run(folder, *arguments, code=0):
    """Standard output of a command that ends with this exit code; of one that fails, the line it ends in."""
    ended, out, err = forked.script(*arguments, cwd=folder)
    assert ended == code, err[-3000:]
    assert not code or err.count("\n") == 1, err
    return err if code else out


@pytest.mark.slow
def test_a_method_of_a_users_own_file_goes_through_every_door(folder):
    own = ["--methods", "core.py"]
    settings = ["model.peft.core_lora_tuning.std_R=0.5", "model.peft.core_lora_tuning.rank=4"]
    job = [
        "model.peft.peft_scheme=core_lora", *settings, "trainer.max_steps=2", "trainer.val_check_interval=2",
        "exp_manager.exp_dir=runs", "exp_manager.name=own", "model.global_batch_size=4", "model.micro_batch_size=2",
    ]  # fmt: skip
    assert "core_lora_tuning" in run(folder, SCRIPT, *job, code=2)  # nobody has loaded it
    assert "std_R=0.0" in run(folder, SCRIPT, "--help", *own)
    assert "there is no 'std_S'; did you mean 'std_R'" in run(
        folder, SCRIPT, *own, "model.peft.core_lora_tuning.std_S=1", code=2
    )
    assert "core_lora: exact_string_match" in run(folder, SCRIPT, *own, *job)
    summary = json.loads((folder / "runs" / "own" / "summary.json").read_text())
    assert summary["trainable"] == 4 * 4 * 4  # R of every layer
    assert "already finished" in run(folder, SCRIPT, *own, *job)

    adapter = summary["adapter"]
    for command in ((GENERATOR, "--adapter", adapter, "two plus two is"), (*TIEDLORA, "inspect", adapter)):
        refused = run(folder, *command, code=2)
        assert "core_lora" in refused and "--methods FILE.py" in refused
        assert run(folder, *command, *own)
    counted = run(folder, *TIEDLORA, *own, "params", "--scheme=core_lora", "--layers=32", "--hidden=4096", "--json")
    assert json.loads(counted)["trainable"] == 2048
    assert "core_lora" in run(folder, *TIEDLORA, "methods", *own)

    suite = ["run", "second-v1", "--variant=core", "--variants-path=variants", "--steps=2", "--limit=8", "--results=r"]
    assert "scheme='core_lora'" in run(folder, *SUITE, *suite, code=2)
    result = json.loads(run(folder, *SUITE, *own, *suite, "--json"))["results"][0]
    assert (result["status"], result["trainable"]) == ("done", 64)

    changed = (folder / "core.py").read_text().replace("a trained matrix", "another matrix")
    (folder / "changed.py").write_text(changed)
    assert "--methods=" in run(folder, SCRIPT, "--methods", "changed.py", *job, code=2)


@pytest.mark.thorough
@pytest.mark.parametrize("command", [[SCRIPT], ["-m", "nemo_tiedlora", "finetune"]], ids=["script", "command"])
def test_the_processes_of_other_devices_have_the_method_too(folder, command):
    job = [
        "model.peft.peft_scheme=core_lora", "trainer.devices=2", "trainer.max_steps=2", "trainer.val_check_interval=2",
        f"exp_manager.exp_dir=two-{len(command)}", "model.global_batch_size=8", "model.micro_batch_size=4",
        "model.data.validation_ds.metric.name=loss", "model.data.validation_ds.micro_batch_size=8",
    ]  # fmt: skip
    line = [sys.executable, *map(str, command), "--methods", "core.py", *job]
    environment = toy.FRESH | {"PYTHONPATH": str(ROOT)}
    done = subprocess.run(line, cwd=folder, capture_output=True, text=True, timeout=300, env=environment)
    assert done.returncode == 0 and "core_lora: loss" in done.stdout, done.stderr[-2000:]
