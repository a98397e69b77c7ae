"""Bases of other forms by the script and the commands: fine-tuned, generated from, merged."""

import json
from pathlib import Path

import bases
import forked
import pytest
import toy

from nemo_tiedlora import platform
from nemo_tiedlora.checkpoint.base import open_base
from nemo_tiedlora.model.data import over

SCRIPT = Path(__file__).parents[2] / "examples" / "megatron_gpt_finetuning.py"
pytestmark = [pytest.mark.slow, pytest.mark.thorough]
PROMPTS = "what is 1 plus 2?", "what is 7 plus 9?"


def done(*arguments):
    code, out, err = forked.script(*arguments)
    assert code == 0, err[-3000:]
    return out


#: By base, what is adapted.
TARGETS = {"experts": "all", "shared expert": "mlp", "gpt2": "attention"}


@pytest.mark.parametrize("base", TARGETS)
def test_an_adapter_of_another_base_from_training_to_text(tmp_path, base):
    with platform.host(), toy.clean_megatron():
        made = bases.save(base, toy.tokenizer(tmp_path), tmp_path)
    file = tmp_path / "base.nemo"
    with open_base(made) as opened:  # as one that was trained with its experts on two ranks
        spread = {"expert_model_parallel_size": 2} if base == "experts" else {}
        opened.write(file, over(opened.config, spread), [], None)
    rows = {name: toy.sums(tmp_path / f"{name}.jsonl", 80, seed) for seed, name in enumerate(("train", "validation"))}
    job = [
        f"model.restore_from_path={file}",
        *(f"model.data.{name}_ds.file_names=[{path}]" for name, path in rows.items()),
        "model.data.validation_ds.tokens_to_generate=3",
        "model.data.train_ds.max_seq_length=48",
        "model.peft.peft_scheme=tied_lora",
        "model.optim.lr=0.05",
        "+model.optim.sched.max_steps=6",
        "trainer.limit_val_batches=1",
    ]
    targets = "model.peft.tied_lora_tuning.target_modules"
    command = ["-m", "nemo_tiedlora"]

    # Ended, and gone on with.
    at = f"exp_manager.explicit_log_dir={tmp_path / 'run'}"
    for steps in (3, 6):
        length = f"trainer.max_steps={steps}", "trainer.val_check_interval=3"
        out = done(SCRIPT, *job, at, f"{targets}=[{TARGETS[base]}]", *length)
    assert "resuming from" in out
    summary = json.loads(Path(out.splitlines()[-1]).read_text())
    counted = json.loads(done(*command, "params", "--base", file, "--targets", TARGETS[base], "--json"))
    assert summary["steps"] == 6 and summary["trainable"] == counted["trainable"]

    adapter, merged = summary["adapter"], tmp_path / "merged.nemo"
    facts = json.loads(done(*command, "merge", "--base", file, "--adapter", adapter, "--out", merged, "--json"))
    assert facts["base_checksum"] == "matches"
    generate = [*command, "generate", *PROMPTS, "--tokens", 6, "--json", "--base"]
    plain, adapted = done(*generate, file), done(*generate, file, "--adapter", adapter)
    assert len(adapted.splitlines()) == len(PROMPTS) and adapted != plain
    assert done(*generate, merged) == adapted

    if base == "gpt2":  # which has learned positions, and so an end
        code, out, err = forked.script(*command, "generate", "hi", "what is 1 plus 2? " * 50, "--base", file)
        assert code == 2 and not out
        assert "prompt='what is 1 plus 2? what is 1 plus 2? what…': has " in err and err.count("\n") == 1
