"""The fine-tuning script as a user runs it: processes, signals, files."""

import json
import random
import signal
import time
from pathlib import Path

import forked
import pytest

ROOT = Path(__file__).parents[2]
SCRIPT = ROOT / "examples" / "megatron_gpt_finetuning.py"
DATA = ROOT.parent / "shared" / "data"
pytestmark = pytest.mark.slow


#: NeMo's own schemes that differ from its LoRA in nothing that the script sees.
STOCK = ("adapter", "ia3", "ptuning")


def start(folder, *overrides):
    return forked.Script(SCRIPT, *overrides, cwd=folder)


def run(folder, *overrides):
    return start(folder, *overrides).finish()


def summary(out, folder):
    return json.loads((folder / out.splitlines()[-1]).read_text())


def last_checkpoint(folder):
    import torch

    (path,) = folder.rglob("*-last.ckpt")
    return torch.load(path, weights_only=False)


def assert_same(ours, reference):
    """Every tensor and every optimizer state, to the bit."""
    import torch

    assert ours.keys() == reference.keys()
    for name, value in reference.items():
        if isinstance(value, dict):
            assert_same(ours[name], value)
        else:
            assert torch.equal(ours[name], value) if isinstance(value, torch.Tensor) else ours[name] == value, name


#: A short run of the built-in task with an optimizer state, dropout and validations to lose; a checkpoint every few
#: steps, so that some kills hit one; and one folder, so that all runs are one.
SHORT = (
    "trainer.val_check_interval=5",
    "trainer.limit_val_batches=1",
    "model.data.validation_ds.metric.name=loss",
    "exp_manager.exp_dir=runs",
    "exp_manager.name=run",
)

TIED = ("model.peft.peft_scheme=tied_lora", "model.peft.tied_lora_tuning.dropout=0.1")
DYNAMIC = (
    "model.peft.peft_scheme=dyna_lora",
    "model.peft.dyna_lora_tuning.dropout=0.1",
    "model.peft.dyna_lora_tuning.period=7",
    "model.peft.dyna_lora_tuning.optimizer=local",
)


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    """``whole(*overrides)`` → the last checkpoint of a run that nothing disturbed, made once."""
    made = {}

    def of(*overrides):
        if overrides not in made:
            folder = tmp_path_factory.mktemp("whole")
            code, _, err = run(folder, *overrides)
            assert code == 0, err[-2000:]
            made[overrides] = last_checkpoint(folder)
        return made[overrides]

    return of


@pytest.mark.parametrize(("signum", "scheme"), [(signal.SIGINT, TIED), (signal.SIGTERM, DYNAMIC)])
def test_an_interrupted_run_continues_to_the_same_result(tmp_path, whole, signum, scheme):
    settings = (*SHORT, *scheme, "trainer.max_steps=40")
    reference = whole(*settings)
    cut = start(tmp_path, *settings)
    deadline = time.monotonic() + 300
    while not list(tmp_path.rglob("*step=10*.ckpt")) and time.monotonic() < deadline:
        time.sleep(0.05)
    cut.send_signal(signum)
    code, out, err = cut.finish()
    assert code == 128 + signum, err[-2000:]
    assert "The same command continues from there." in out
    assert 10 <= last_checkpoint(tmp_path)["global_step"] < 40
    code, out, err = run(tmp_path, *settings)
    assert code == 0, err[-2000:]
    assert "resuming from" in out
    ours = last_checkpoint(tmp_path)
    assert ours["global_step"] == reference["global_step"] == 40
    assert_same(ours["adapters"], reference["adapters"])
    assert summary(out, tmp_path)["steps"] == 40


@pytest.mark.parametrize(("kills", "steps"), [(2, 40), pytest.param(20, 300, marks=pytest.mark.thorough)])
def test_a_run_killed_at_any_moment_ends_as_an_undisturbed_one(tmp_path, whole, kills, steps):
    """kill -9: while it starts, trains, validates or saves; what is left always continues to the same end."""
    settings = (*SHORT, *TIED, f"trainer.max_steps={steps}")
    reference = whole(*settings)
    moments = random.Random(0)
    for _ in range(kills):
        known = checkpoints(tmp_path)
        cut = start(tmp_path, *settings)
        deadline = time.monotonic() + 120
        while checkpoints(tmp_path) == known and cut.poll() is None and time.monotonic() < deadline:
            time.sleep(0.005)
        time.sleep(moments.uniform(0, 0.4))
        assert cut.poll() is None, "the run was over before it could be killed"
        cut.send_signal(signal.SIGKILL)
        cut.finish()
    code, out, err = run(tmp_path, *settings)
    assert code == 0, err[-2000:]
    assert_same(last_checkpoint(tmp_path)["adapters"], reference["adapters"])


def checkpoints(folder):
    """Names of all that are in it, complete or not."""
    return {path.name for path in folder.rglob("*.ckpt*")}


def test_bad_input_is_one_line_and_exit_code_2(tmp_path):
    cases = {
        "model.peft.peft_scheme=tied_lra": "did you mean 'tied_lora'",
        "model.peft.tied_lora_tuning.preset=TL7": "model.peft.tied_lora_tuning.preset='TL7'",
        "model.peft.tied_lora_tuning.rnk=8": "there is no 'rnk'; did you mean 'rank'?",
        "model.optm.lr=1": "there is no 'optm'; did you mean 'optim'?",
        "model.restore_from_path=missing.nemo": "model.restore_from_path='missing.nemo': no such file",
        "exp_manager.exp_dir=/proc/nowhere": "cannot be written to",
    }
    for override, message in cases.items():
        code, out, err = run(tmp_path, override)
        assert code == 2, override
        assert message in err and err.startswith("error: ") and err.count("\n") == 1 and not out, (override, err)


@pytest.mark.skipif(not DATA.is_dir(), reason="the real rows are not beside the checkout")
def test_real_rows_train_and_generate(tmp_path):
    code, out, err = run(
        tmp_path,
        "model.peft.peft_scheme=tied_lora",
        f"model.data.train_ds.file_names=[{DATA}/dialogsum/train.jsonl]",
        f"model.data.validation_ds.file_names=[{DATA}/dialogsum/validation.jsonl]",
        'model.data.train_ds.prompt_template="{dialogue}\\nSummary: {summary}"',
        "model.data.train_ds.label_key=summary",
        "model.data.train_ds.truncation_field=dialogue",
        "model.data.train_ds.max_seq_length=256",
        "model.global_batch_size=4",
        "model.micro_batch_size=4",
        "model.optim.lr=2e-2",
        "trainer.max_steps=40",
        "trainer.val_check_interval=20",
        "trainer.limit_val_batches=4",
    )
    assert code == 0, err[-2000:]
    facts = summary(out, tmp_path)
    assert facts["metric"] == "loss" and facts["metric_after"] < facts["metric_before"]
    assert len(facts["samples"]) == 3 and all(sample["after"] for sample in facts["samples"])


@pytest.mark.parametrize(
    "scheme", ["vera", "lora", "none", *(pytest.param(name, marks=pytest.mark.thorough) for name in STOCK)]
)
def test_every_scheme_runs_through_the_same_script(tmp_path, scheme):
    steps = ("trainer.max_steps=20", "trainer.val_check_interval=20")
    code, out, err = run(tmp_path, f"model.peft.peft_scheme={scheme}", *steps)
    assert code == 0, err[-2000:]
    facts = summary(out, tmp_path)
    assert facts["scheme"] == scheme and facts["trainable"] > 0 and Path(facts["adapter"]).is_file()
    assert "NeMo I" not in out + err and "NeMo W" not in err, err[-2000:]


def test_groups_are_found_first_and_modules_take_turns(tmp_path):
    """DynaLoRA over ShareLoRA whose groups come from a text: the run's folder says what was found and who trained."""
    (tmp_path / "text.txt").write_text("In line: Emma Ben Vera Leo.\nIn line: Anna Carl Kate Mary Jack.\n")
    calibration = "{data: text.txt, threshold: 0.5}"
    missing = "model.peft.share_lora_tuning.groups={data: missing.txt}"
    code, _, err = run(tmp_path, "model.peft.peft_scheme=share_lora", missing)
    assert code == 2 and "missing.txt': no such file" in err and err.count("\n") == 1
    code, out, err = run(
        tmp_path,
        "model.peft.peft_scheme=dyna_lora",
        "model.peft.dyna_lora_tuning.inner=share_lora",
        f"model.peft.dyna_lora_tuning.settings={{groups: {calibration}}}",
        "model.peft.dyna_lora_tuning.period=5",
        *SHORT,
        "trainer.max_steps=12",
        "trainer.val_check_interval=12",
    )
    assert code == 0, err[-2000:]
    facts = summary(out, tmp_path)
    here = (tmp_path / out.splitlines()[-1]).parent
    (groups,) = (here / "groups").glob("groups-*.json")
    found = json.loads(groups.read_text())
    history = json.loads((here / "allocations.json").read_text())
    assert [entry["step"] for entry in history["log"]] == [0, 5, 10]
    assert sum(history["active_steps"]) == 12 * 3  # two thirds of four layers
    _, out, _ = forked.script("-m", "nemo_tiedlora.cli", "inspect", "--json", facts["adapter"])
    saved = json.loads(out)
    assert saved["scheme"] == "dyna_lora" and saved["settings"]["groups"] == found["groups"]
    assert saved["trainable"] == facts["trainable"] == found["trainable"]


def test_training_goes_on_from_a_saved_adapter_with_its_settings(tmp_path):
    first = ("model.peft.tied_lora_tuning.rank=4", "model.peft.tied_lora_tuning.preset=TL2")
    steps = (*SHORT, "trainer.max_steps=10", "trainer.val_check_interval=10")
    code, out, err = run(tmp_path, *first, *steps)
    assert code == 0, err[-2000:]
    trained = summary(out, tmp_path)
    restored = f"model.peft.restore_from_path={trained['adapter']}"
    code, out, err = run(tmp_path, restored, *steps, "exp_manager.exp_dir=again")
    assert code == 0, err[-2000:]
    continued = summary(out, tmp_path)
    assert continued["trainable"] == trained["trainable"]
    assert continued["metric_before"] == trained["metric_after"]


def test_verbose_brings_the_log_of_nemo_back(tmp_path):
    code, out, err = run(tmp_path, *SHORT, "verbose=true", "trainer.max_steps=2", "trainer.val_check_interval=2")
    assert code == 0, err[-2000:]
    assert "NeMo I" in out


def test_generation_reads_arguments_a_file_and_standard_input(tmp_path):
    script = ROOT / "examples" / "megatron_gpt_generate.py"
    prompts = ["In line: Emma Ben Vera Leo. After Ben comes", "Привет, 世界"]
    (tmp_path / "prompts.txt").write_text("\n".join(prompts))
    outputs = []
    for arguments, stdin in ((prompts, ""), (["--file", "prompts.txt"], ""), ([], "\n".join(prompts))):
        code, out, err = forked.script(script, "--tokens", "4", "--json", *arguments, cwd=tmp_path, stdin=stdin)
        assert code == 0, err[-2000:]
        outputs.append([json.loads(line) for line in out.splitlines()])
    assert outputs[0] == outputs[1] == outputs[2]
    assert [line["prompt"] for line in outputs[0]] == prompts


def test_generation_refuses_an_adapter_that_is_none(tmp_path):
    (tmp_path / "no.nemo").write_text("text")
    script = ROOT / "examples" / "megatron_gpt_generate.py"
    code, _, err = forked.script(script, "--adapter", "no.nemo", "--base", "no.nemo", "hello", cwd=tmp_path)
    assert code == 2 and err.count("\n") == 1 and "base='no.nemo'" in err
