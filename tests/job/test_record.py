"""What a run may continue with."""

import pytest
from omegaconf import OmegaConf

from nemo_tiedlora.errors import UsageError
from nemo_tiedlora.job.record import Record


def config(tmp_path, **overrides):
    """The settings that matter here, of a run whose files are there."""
    for name in ("base.nemo", "train.jsonl"):
        if not (tmp_path / name).exists():
            (tmp_path / name).write_text(name)
    settings = {
        "name": "run",
        "verbose": False,
        "trainer": {"max_steps": 10, "precision": 32, "devices": 1, "num_nodes": 1, "val_check_interval": 5},
        "exp_manager": {"exp_dir": "runs", "checkpoint_callback_params": {"monitor": "validation_loss"}},
        "model": {
            "seed": 1,
            "tensor_model_parallel_size": 1,
            "global_batch_size": 8,
            "restore_from_path": str(tmp_path / "base.nemo"),
            "peft": {"peft_scheme": "tied_lora", "tied_lora_tuning": {"rank": 8}, "vera_tuning": {"rank": 8}},
            "data": {"train_ds": {"file_names": [str(tmp_path / "train.jsonl")], "num_workers": 0}},
            "optim": {"lr": 0.1, "sched": {"name": "CosineAnnealing"}},
        },
    }
    made = OmegaConf.create(settings)
    for name, value in overrides.items():
        OmegaConf.update(made, name, value, force_add=True)
    return made


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("model.seed", 2),
        ("model.peft.tied_lora_tuning.rank", 4),
        ("model.peft.peft_scheme", "vera"),
        ("model.global_batch_size", 16),
        ("model.optim.lr", 0.2),
        ("model.optim.sched.name", "ConstantAnnealing"),
        ("trainer.precision", "bf16"),
        ("trainer.max_steps", 20),
        ("trainer.gradient_clip_val", 1.0),
        ("exp_manager.checkpoint_callback_params.monitor", "validation_rouge"),
        ("model.data.train_ds.prompt_template", "{a}"),
    ],
)
def test_what_moves_a_number_is_refused_by_name(tmp_path, name, value):
    earlier = Record.of(config(tmp_path))
    with pytest.raises(UsageError, match=f"^{name}=") as refused:
        Record.of(config(tmp_path, **{name: value})).check_continues(earlier, "runs/run")
    assert "runs/run was started with" in str(refused.value) and "exp_manager.exp_dir" in str(refused.value)


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("verbose", True),
        ("name", "other"),
        ("exp_manager.exp_dir", "elsewhere"),
        ("model.data.train_ds.num_workers", 4),
        ("model.peft.vera_tuning.rank", 4),  # of a scheme that is not used
    ],
)
def test_what_moves_none_may_change(tmp_path, name, value):
    earlier = Record.of(config(tmp_path))
    assert Record.of(config(tmp_path, **{name: value})).check_continues(earlier, "runs/run") == []


def test_early_stopping_and_the_names_of_checkpoints_decide_too(tmp_path):
    earlier = Record.of(config(tmp_path))
    for name in ("early_stopping_callback_params.patience", "checkpoint_callback_params.filename"):
        with pytest.raises(UsageError, match=f"^exp_manager.{name}="):
            Record.of(config(tmp_path, **{f"exp_manager.{name}": 3})).check_continues(earlier, "runs/run")


def test_the_layout_of_a_scheme_of_nemos_own_cannot_change(tmp_path):
    lora = {"model.peft.peft_scheme": "lora"}
    earlier = Record.of(config(tmp_path, **lora))
    with pytest.raises(UsageError, match="^model.tensor_model_parallel_size=2"):
        Record.of(config(tmp_path, **lora, **{"model.tensor_model_parallel_size": 2})).check_continues(earlier, "run")


def test_an_adapter_in_a_folder_counts_by_its_content(tmp_path):
    (tmp_path / "adapter").mkdir()
    (tmp_path / "adapter" / "adapter_config.json").write_text("one")
    started = {"model.peft.restore_from_path": str(tmp_path / "adapter")}
    earlier = Record.of(config(tmp_path, **started))
    (tmp_path / "adapter" / "adapter_config.json").write_text("other")
    with pytest.raises(UsageError, match="^model.peft.restore_from_path=.*other content"):
        Record.of(config(tmp_path, **started)).check_continues(earlier, "run")


def test_layout_and_versions_are_said(tmp_path):
    earlier = Record.of(config(tmp_path))
    now = Record.of(config(tmp_path, **{"model.tensor_model_parallel_size": 2}))
    now.versions["torch"] = "9.9"
    said = now.check_continues(earlier, "runs/run")
    assert said[0] == "model.tensor_model_parallel_size=2 from here on; it was 1"
    assert said[1].startswith("torch 9.9 from here on; it was ")


def test_files_count_by_their_content(tmp_path):
    earlier = Record.of(config(tmp_path))
    moved = tmp_path / "moved.jsonl"
    moved.write_text("train.jsonl")
    now = config(tmp_path, **{"model.data.train_ds.file_names": [str(moved)]})
    assert Record.of(now).check_continues(earlier, "runs/run") == []
    moved.write_text("other")
    with pytest.raises(UsageError, match="train_ds.file_names=.*other content"):
        Record.of(now).check_continues(earlier, "runs/run")
    (tmp_path / "base.nemo").write_text("other")
    with pytest.raises(UsageError, match="model.restore_from_path=.*other content"):
        Record.of(config(tmp_path)).check_continues(earlier, "runs/run")


def test_a_schedule_of_its_own_length_may_go_on_for_longer(tmp_path):
    fixed = {"model.optim.sched.max_steps": 100}
    earlier = Record.of(config(tmp_path, **fixed))
    longer = Record.of(config(tmp_path, **fixed, **{"trainer.max_steps": 20}))
    assert longer.check_continues(earlier, "run") == ["trainer.max_steps=20 from here on; it was 10"]


def test_a_record_is_the_same_when_read_back_and_refused_when_damaged(tmp_path):
    record = Record.of(config(tmp_path))
    record.write(tmp_path / "run.json")
    assert Record.read(tmp_path / "run.json") == record
    (tmp_path / "run.json").write_text("{")
    with pytest.raises(UsageError, match="run.json': damaged"):
        Record.read(tmp_path / "run.json")
