"""Every mistake a user can make, in one line, without importing NeMo."""

import io
import json
import subprocess
import sys
import tarfile
from pathlib import Path

import pytest
import torch
from checkpoint.conftest import _make
from omegaconf import OmegaConf

from nemo_tiedlora import files
from nemo_tiedlora.checkpoint import write
from nemo_tiedlora.errors import UsageError
from nemo_tiedlora.job.finetune import checked, choose_folder
from nemo_tiedlora.job.script import prepare_hydra
from nemo_tiedlora.model.config import nemo_config

CONF = Path(__file__).parents[2] / "conf"
BASE = {
    "mcore_gpt": True,
    "num_layers": 4,
    "hidden_size": 32,
    "ffn_hidden_size": 64,
    "num_attention_heads": 4,
    "num_query_groups": 2,
    "kv_channels": None,
    "activation": "gelu",
}


def nemo_file(path, config, **files):
    files = {"model_config.yaml": OmegaConf.to_yaml(OmegaConf.create(config)).encode(), **files}
    with tarfile.open(path, "w") as archive:
        for name, data in files.items():
            member = tarfile.TarInfo(f"./{name}")
            member.size = len(data)
            archive.addfile(member, io.BytesIO(data))
    return path


def jsonl(path, rows):
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def job(tmp_path, *overrides):
    """The script's own config, with a sound base and data."""
    from hydra import compose, initialize_config_dir

    prepare_hydra()
    rows = jsonl(tmp_path / "rows.jsonl", [{"input": "a", "output": "b"}] * 3)
    with initialize_config_dir(str(CONF), version_base="1.3"):
        cfg = compose(
            "megatron_gpt_finetuning_config",
            [f"model.data.train_ds.file_names=[{rows}]", f"model.data.validation_ds.file_names=[{rows}]", *overrides],
        )
    OmegaConf.resolve(cfg)
    return cfg


def refusal(cfg, base=None):
    with pytest.raises(UsageError) as error:
        checked(cfg, OmegaConf.create(BASE if base is None else base))
    assert "\n" not in str(error.value)
    return str(error.value)


def test_a_sound_job_passes(tmp_path):
    checked(job(tmp_path), OmegaConf.create(BASE))


@pytest.mark.parametrize(
    "scheme", ["lora", "none", "adapter", "ia3", "ptuning", "vera", "tied_lora", "share_lora", "cond_lora", "dyna_lora"]
)
def test_every_scheme_passes(tmp_path, scheme):
    checked(job(tmp_path, f"model.peft.peft_scheme={scheme}"), OmegaConf.create(BASE))


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("model.peft.peft_scheme=tied_lra", "did you mean 'tied_lora'"),
        ("model.peft.tied_lora_tuning.preset=TL66", "model.peft.tied_lora_tuning.preset='TL66': did you mean 'TL6'"),
        ("+model.virtual_pipeline_model_parallel_size=2", "NeMo no longer supports it"),
        ("+model.context_parallel_size=2", "needs the attention of Transformer Engine"),
        ("model.peft.tied_lora_tuning.train=[A,w]", "model.peft.tied_lora_tuning.train='w': Valid: A, B, u, v"),
        ("model.peft.tied_lora_tuning.rank=0", "rank=0: must be a whole number > 0"),
        ("model.peft.tied_lora_tuning.rank=33", "rank=33: larger than the layer"),
        ("model.peft.tied_lora_tuning.layer_selection=[5]", "layer_selection=5: the base has layers 1 to 4"),
        ("model.peft.tied_lora_tuning.target_modules=[attention_qkw]", "did you mean 'attention_qkv'"),
        ("model.peft.tied_lora_tuning.target_modules=[attention_qkv,attention_q]", "inside a fused projection"),
        ("model.peft.tied_lora_tuning.target_modules=[]", "write a list of names"),
        ("model.peft.tied_lora_tuning.target_modules=attention_qkv", "write a list of names"),
        ("model.peft.tied_lora_tuning.layer_selection=5", "layer_selection=5: write a list of whole numbers"),
        ("model.peft.tied_lora_tuning.dropout=null", "dropout=None: must be a number"),
        ("model.peft.tied_lora_tuning.alpha=x", "alpha='x': must be a number"),
        ("model.peft.tied_lora_tuning.train=5", "train=5: write a list"),
        ("model.data.train_ds.prompt_template=null", "model.data.train_ds.prompt_template=None"),
        ("model.data.train_ds.file_names=[]", "name at least one JSONL file"),
        ("model.peft.tied_lora_tuning.target_modules=[mlp_gate]", "has no gate"),
        ("+model.peft.tied_lora_tuning.ranks=8", "ranks=8: unknown setting; did you mean 'rank'"),
        (
            "model.data.train_ds.file_names=[missing.jsonl]",
            "model.data.train_ds.file_names='missing.jsonl': no such file",
        ),
        ("model.data.validation_ds.file_names=null", "name at least one JSONL file"),
        ("model.data.train_ds.file_names=rows.jsonl", "write a list: [rows.jsonl]"),
        ('model.data.train_ds.prompt_template="{input} {output}."', "must end with the label_key, {output}"),
        (
            'model.data.train_ds.prompt_template="{inputs} {output}"',
            "truncation_field='input': not in the prompt template",
        ),
    ],
)
def test_a_bad_setting_is_named_with_the_way_out(tmp_path, override, message):
    assert message in refusal(job(tmp_path, override))


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("", "the file is empty"),
        ('{"input": "a", "output": "b"}\n{"input": \n', "line 2 is not JSON"),
        ('{"input": "a", "output": "b"}\n\n', "line 2 is empty"),
        ('{"input": "a", "output": "b"}\n[1]\n', "line 2 is not a JSON object"),
        ('{"input": "a", "output": 3}\n', "line 1: 'output' is 3; it must be text"),
        ('{"input": "a", "output": "b"}\n{"inptu": "a", "output": "b"}\n', "line 2 has no field 'input'"),
    ],
)
def test_a_bad_data_file_is_named_with_its_line(tmp_path, content, message):
    path = tmp_path / "bad.jsonl"
    path.write_text(content)
    line = refusal(job(tmp_path, f"model.data.train_ds.file_names=[{path}]"))
    assert message in line and str(path) in line


def test_what_is_not_a_nemo_file_is_refused(tmp_path):
    cases = {
        "missing.nemo": None,
        "text.nemo": b"not a tar",
        "cut.nemo": nemo_file(tmp_path / "whole.nemo", BASE).read_bytes()[:600],
    }
    for name, content in cases.items():
        if content is not None:
            (tmp_path / name).write_bytes(content)
        with pytest.raises(UsageError, match="model.restore_from_path"):
            nemo_config(tmp_path / name, "model.restore_from_path")


def test_a_base_that_is_not_megatron_core_is_refused(tmp_path):
    assert "not a Megatron-core GPT" in refusal(job(tmp_path), BASE | {"mcore_gpt": False})


def test_an_adapter_for_another_base_is_refused(tmp_path):
    adapter = tmp_path / "adapter.nemo"
    write(_make(shape=BASE | {"hidden_size": 64}), adapter)
    line = refusal(job(tmp_path, f"model.peft.restore_from_path={adapter}"))
    assert "made for another base: hidden_size was 64, here it is 32" in line


def test_an_adapter_of_another_scheme_is_refused(tmp_path):
    weights = io.BytesIO()
    torch.save({"weight": torch.ones(2)}, weights)
    config = BASE | {"peft": {"peft_scheme": "lora"}}
    adapter = nemo_file(tmp_path / "adapter.nemo", config, **{"model_weights.ckpt": weights.getvalue()})
    assert "set model.peft.peft_scheme=lora" in refusal(job(tmp_path, f"model.peft.restore_from_path={adapter}"))


def test_an_output_folder_that_cannot_be_written_is_refused(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(UsageError, match="cannot be written to"):
        files.check_output(tmp_path / "file" / "runs", "exp_manager.exp_dir")


def test_a_full_disk_is_refused(tmp_path, monkeypatch):
    monkeypatch.setattr(files, "MINIMUM_FREE_BYTES", 2**70)
    with pytest.raises(UsageError, match="no disk space"):
        files.check_output(tmp_path, "exp_manager.exp_dir")


def test_checks_do_not_import_nemo():
    code = "import sys, nemo_tiedlora.job.finetune, nemo_tiedlora.job.script; sys.exit('nemo' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code]).returncode == 0


def test_importing_the_package_imports_neither_torch_nor_nemo():
    code = "import sys, nemo_tiedlora; sys.exit('torch' in sys.modules or 'nemo' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code]).returncode == 0


class TestRunFolder:
    def choose(self, tmp_path, monkeypatch, text, *overrides):
        monkeypatch.chdir(tmp_path)
        return choose_folder(job(tmp_path, *overrides), text)

    def run(self, tmp_path, name, config, finished):
        folder = tmp_path / "nemo_experiments" / "megatron_gpt_peft_tied_lora_tuning" / name
        folder.mkdir(parents=True)
        (folder / "config.yaml").write_text(config)
        if finished:
            (folder / "summary.json").write_text("{}")

    def test_the_first_run_gets_the_first_folder(self, tmp_path, monkeypatch):
        assert self.choose(tmp_path, monkeypatch, "a").name == "run-001"

    @pytest.mark.parametrize(
        ("config", "finished", "expected"), [("a", False, "run-001"), ("a", True, "run-002"), ("b", False, "run-002")]
    )
    def test_only_an_unfinished_run_of_the_same_config_is_continued(
        self, tmp_path, monkeypatch, config, finished, expected
    ):
        self.run(tmp_path, "run-001", config, finished)
        assert self.choose(tmp_path, monkeypatch, "a").name == expected

    def test_other_runs_in_between_do_not_matter(self, tmp_path, monkeypatch):
        for name, config, finished in (("run-002", "a", False), ("run-003", "b", False), ("run-007", "c", True)):
            self.run(tmp_path, name, config, finished)
        assert self.choose(tmp_path, monkeypatch, "a").name == "run-002"
        assert self.choose(tmp_path, monkeypatch, "d").name == "run-008"

    def test_a_named_folder_is_taken_as_nemo_takes_it(self, tmp_path, monkeypatch):
        folder = self.choose(tmp_path, monkeypatch, "a", f"exp_manager.exp_dir={tmp_path}", "exp_manager.name=mine")
        assert folder == tmp_path / "mine"
