"""Settings and rows as people get them wrong: each ends in one line with the way out, before anything is loaded."""

import copy
import json
from pathlib import Path

import forked
import pytest
from hydra import compose, initialize_config_dir
from omegaconf import OmegaConf, open_dict

from nemo_tiedlora.errors import UsageError
from nemo_tiedlora.huggingface import bases
from nemo_tiedlora.job import finetune, settings
from nemo_tiedlora.job.script import prepare_hydra

ROOT = Path(__file__).parents[2]
SCRIPT = ROOT / "examples" / "megatron_gpt_finetuning.py"
ROW = {"input": "a", "output": "b"}
CHAT = {"messages": [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}]}
NEMO = {
    "system": "",
    "mask": "User",
    "conversations": [{"from": "User", "value": "a"}, {"from": "Assistant", "value": "b"}],
}
TRAIN, VALIDATION = "model.data.train_ds", "model.data.validation_ds"
NAN, INFINITE = float("nan"), float("inf")


class Started(Exception):
    """Everything was checked, and the job would have begun."""


@pytest.fixture(scope="module")
def composed():
    prepare_hydra()
    with initialize_config_dir(str(ROOT / "conf"), version_base="1.3"):
        return compose("megatron_gpt_finetuning_config")


@pytest.fixture
def job(tmp_path, monkeypatch, composed):
    """Run the main job with changed settings up to where NeMo would be imported."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.delenv("TORCHELASTIC_RUN_ID", raising=False)

    def stop(*args, **kwargs):
        raise Started

    monkeypatch.setattr(finetune, "quiet", stop)
    monkeypatch.setattr(bases.embedded_base, "base", lambda: "base.nemo")

    def run(changed=(), rows=ROW):
        lines = rows if isinstance(rows, bytes) else (json.dumps(rows) + "\n").encode() * 3
        Path("rows.jsonl").write_bytes(lines)
        cfg = copy.deepcopy(composed)
        with open_dict(cfg):
            for split in (TRAIN, VALIDATION):
                OmegaConf.update(cfg, f"{split}.file_names", ["rows.jsonl"])
            for name, value in dict(changed).items():
                OmegaConf.update(cfg, name, value, merge=False)
        finetune.finetune(cfg)

    return run


def refusal(job, *args):
    with pytest.raises(UsageError) as error:
        job(*args)
    line = str(error.value)
    assert "\n" not in line
    assert not list(Path().rglob("*.nemo")) and not Path("nemo_experiments").exists()
    return line


@pytest.mark.parametrize(
    ("rows", "chat"),
    [
        (ROW, False),
        (CHAT, True),
        (NEMO, True),
        ({"messages": [{"role": "system", "content": ""}, *CHAT["messages"] * 3, CHAT["messages"][0]]}, True),
        (b"\xef\xbb\xbf" + json.dumps(ROW).encode() + b"\r\n" + json.dumps(ROW).encode(), False),
        ({"input": "a\0b", "output": "b", "other": 1e308}, False),
        ({"input": "a", "output": ""}, False),
    ],
)
def test_sound_rows_pass(job, rows, chat):
    with pytest.raises(Started):
        job({"model.data.chat": chat}, rows)


BAD_SETTINGS = [
    ("exp_manager.name", 7, "must be text"),
    ("exp_manager.name", None, "must be text"),
    ("exp_manager.name", "a/b", "no slashes"),
    ("exp_manager.name", "..", "no slashes"),
    ("exp_manager.name", "a\nb", "no slashes, line breaks"),
    ("exp_manager.exp_dir", 7, "must be text, or null"),
    ("exp_manager.explicit_log_dir", ["a"], "must be text, or null"),
    ("exp_manager.resume_if_exists", "yes", "must be true or false"),
    ("exp_manager", None, "must be a section"),
    ("exp_manager.early_stopping_callback_params.patience", -1, "a whole number from 0"),
    ("exp_manager.early_stopping_callback_params.patience", 1.5, "a whole number from 0"),
    ("exp_manager.early_stopping_callback_params.mode", "low", "Valid: min, max"),
    ("exp_manager.checkpoint_callback_params.save_top_k", "all", "a whole number from -1"),
    ("exp_manager.checkpoint_callback_params.filename", "best-{step}", "must have {consumed_samples} in it"),
    (f"{VALIDATION}.metric.name", "accuracy", "Valid: loss, exact_string_match, rouge"),
    (f"{VALIDATION}.write_predictions_to_file", True, "output_file_path_prefix"),
    ("trainer.devices", 0, "a whole number from 1"),
    ("trainer.devices", "two", "a whole number from 1"),
    ("trainer.devices", [0], "a whole number from 1"),
    ("trainer.num_nodes", -1, "a whole number from 1"),
    ("trainer.accelerator", "tpu", "Valid: auto, gpu"),
    ("trainer.precision", 64, "Valid: 32"),
    ("trainer.precision", "fp16", "did you mean 'bf16'"),
    ("trainer.precision", None, "Valid: 32"),
    ("trainer.max_steps", 0, "a whole number from 1"),
    ("trainer.max_steps", -1, "a whole number from 1"),
    ("trainer.max_steps", 1.5, "a whole number from 1"),
    ("trainer.max_steps", "many", "a whole number from 1"),
    ("trainer.max_steps", None, "a whole number from 1"),
    ("trainer.val_check_interval", 0, "or a fraction"),
    ("trainer.val_check_interval", 1.5, "or a fraction"),
    ("trainer.val_check_interval", None, "or a fraction"),
    ("trainer.limit_val_batches", -0.5, "or a fraction"),
    ("trainer.log_every_n_steps", 0, "a whole number from 1"),
    ("trainer.gradient_clip_val", -1, "a number >= 0, or null"),
    ("trainer.gradient_clip_val", NAN, "a number >= 0, or null"),
    ("verbose", "very", "must be true or false"),
    ("model.seed", -1, "a whole number from 0"),
    ("model.seed", 2**40, "a whole number from 0"),
    ("model.restore_from_path", 7, "must be text, or null"),
    ("model.restore_from_path", ".", "not a .nemo file"),
    ("model.peft.restore_from_path", [1], "must be text, or null"),
    ("model.peft", None, "must be a section"),
    ("model.peft.peft_scheme", ["lora"], "Valid: "),
    ("model.peft.lora_tuning.adapter_dim", 0, "a whole number from 1"),
    ("model.hidden_dropout", 1, "a number from 0 to less than 1"),
    ("model.attention_dropout", "none", "a number from 0 to less than 1"),
    ("model.activations_checkpoint_granularity", "some", "Valid: selective, full"),
    ("model.tensor_model_parallel_size", 0, "a whole number from 1"),
    ("model.tensor_model_parallel_size", 2, "there are 1 (trainer.devices)"),
    ("model.pipeline_model_parallel_size", 3, "there are 1 (trainer.devices)"),
    ("model.pipeline_model_parallel_size", "2", "a whole number from 1"),
    ("model.optim", None, "must be a section"),
    ("model.optim.name", "adamq", "did you mean 'adam"),
    ("model.optim.lr", 0, "a number > 0"),
    ("model.optim.lr", -1e-4, "a number > 0"),
    ("model.optim.lr", NAN, "a number > 0"),
    ("model.optim.lr", INFINITE, "a number > 0"),
    ("model.optim.lr", "1e-4x", "a number > 0"),
    ("model.optim.lr", None, "a number > 0"),
    ("model.optim.weight_decay", -1, "a number >= 0"),
    ("model.optim.betas", [0.9], "must be two numbers"),
    ("model.optim.betas", [0.9, 1.0], "must be two numbers"),
    ("model.optim.betas", "adam", "must be two numbers"),
    ("model.optim.sched", "cosine", "must be a section"),
    ("model.optim.sched.name", "Cosine", "did you mean 'CosineAnnealing'"),
    ("model.optim.sched.warmup_steps", -1, "a whole number from 0"),
    ("model.optim.sched.warmup_steps", 0.1, "a whole number from 0"),
    ("model.optim.sched.min_lr", 1, "higher than model.optim.lr"),
    ("model.data", None, "must be a section"),
    ("model.data.chat", "yes", "must be true or false"),
    ("model.data.chat_prompt_tokens", {"turn_start": "<x>"}, "must give system_turn_start, turn_start"),
    (TRAIN, None, "must be a section"),
    (f"{TRAIN}.file_names", [], "name at least one JSONL file"),
    (f"{TRAIN}.file_names", [None], "must be the name of a JSONL file"),
    (f"{TRAIN}.file_names", [7], "must be the name of a JSONL file"),
    (f"{TRAIN}.file_names", {"a": "b"}, "write a list"),
    (f"{TRAIN}.file_names", ["."], "a folder, not a file"),
    (f"{TRAIN}.global_batch_size", 0, "a whole number from 1"),
    (f"{TRAIN}.global_batch_size", -8, "a whole number from 1"),
    (f"{TRAIN}.global_batch_size", 1.5, "a whole number from 1"),
    (f"{TRAIN}.micro_batch_size", "4", "a whole number from 1"),
    (f"{TRAIN}.micro_batch_size", True, "a whole number from 1"),
    (f"{TRAIN}.micro_batch_size", 3, "must be a multiple of micro_batch_size (3)"),
    (f"{VALIDATION}.micro_batch_size", 100, "must be a multiple of micro_batch_size (100)"),
    (f"{TRAIN}.max_seq_length", 0, "a whole number from 1"),
    (f"{TRAIN}.max_seq_length", None, "a whole number from 1"),
    (f"{VALIDATION}.max_seq_length", 4, "no room for a prompt beside the 32 tokens"),
    (f"{VALIDATION}.tokens_to_generate", 0, "a whole number from 1"),
    (f"{TRAIN}.min_seq_length", -1, "a whole number from 0"),
    (f"{TRAIN}.num_workers", -1, "a whole number from 0"),
    (f"{TRAIN}.shuffle", "no", "must be true or false"),
    (f"{TRAIN}.concat_sampling_probabilities", [0.5, 0.5], "must be a list of 1"),
    (f"{TRAIN}.concat_sampling_probabilities", [-1], "every weight must be a number > 0"),
    (f"{TRAIN}.concat_sampling_probabilities", [NAN], "every weight must be a number > 0"),
    (f"{TRAIN}.concat_sampling_probabilities", 1.0, "must be a list of 1"),
    (f"{TRAIN}.truncation_field", ["input"], "names of fields with commas between"),
    (f"{TRAIN}.truncation_field", "inputs", "did you mean 'input'"),
    (f"{TRAIN}.truncation_method", "middle", "Valid: left, right"),
    (f"{TRAIN}.label_key", None, "the field to learn"),
    (f"{TRAIN}.prompt_template", ["{input} {output}"], "write text such as"),
    (f"{TRAIN}.prompt_template", "{input} {output", "must end with the label_key"),
    (f"{TRAIN}.prompt_template", "{} {input} {output}", "name one field in each pair of braces"),
    (f"{TRAIN}.prompt_template", "{{input}} {output}", "name one field in each pair of braces"),
    (f"{TRAIN}.prompt_template", "{output}{input} {output}", "gives the answer away"),
    (f"{TRAIN}.prompt_template", "{input!r:>10} {input} {output}", "no field 'input!r:>10'"),
    (f"{TRAIN}.prompt_template", "{input} {0} {output}", "no field '0'"),
    (f"{VALIDATION}.metric", "loss", "must be a section"),
    (f"{VALIDATION}.metric.name", "exact_match", "did you mean 'exact_string_match'"),
    (f"{VALIDATION}.metric.name", None, "Valid: loss"),
    (f"{VALIDATION}.names", ["a", "b"], "must be a list of 1 names"),
]


@pytest.mark.parametrize(
    ("name", "value", "message"),
    BAD_SETTINGS,
    ids=[f"{name.split('.')[-1]}={value}" for name, value, _ in BAD_SETTINGS],
)
def test_a_bad_setting_ends_in_one_line(job, name, value, message):
    line = refusal(job, {name: value})
    assert message in line and name.rsplit(".", 1)[0] in line


@pytest.mark.parametrize(
    ("changed", "message"),
    [
        ({"trainer.devices": 3, "model.tensor_model_parallel_size": 3}, "num_attention_heads, 4"),
        ({"trainer.devices": 4, "model.tensor_model_parallel_size": 4}, "num_query_groups, 2"),
        ({"trainer.devices": 3, "model.pipeline_model_parallel_size": 3}, "the base's 4 layers"),
        (
            {"trainer.devices": 3, "model.pipeline_model_parallel_size": 2},
            "need 2 processes, or a multiple; there are 3",
        ),
        ({"trainer.devices": 3}, "times the 3 data-parallel ranks"),
    ],
)
def test_a_layout_that_does_not_fit_ends_in_one_line(job, monkeypatch, changed, message):
    monkeypatch.setattr(settings, "check_gpus", lambda trainer: None)
    assert message in refusal(job, changed)


def test_more_devices_than_there_are_and_other_counts_than_torchruns_end_in_one_line(job, monkeypatch):
    import torch

    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    assert "there are 2 GPUs here" in refusal(job, {"trainer.devices": 4})
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 0)
    assert "there is no GPU here" in refusal(job, {"trainer.accelerator": "gpu"})
    monkeypatch.setenv("TORCHELASTIC_RUN_ID", "1")
    monkeypatch.setenv("WORLD_SIZE", "2")
    assert "torchrun started 2 processes" in refusal(job)


def messages(*turns):
    return {"messages": [{"role": role, "content": content} for role, content in turns]}


def conversation(**changed):
    return NEMO | changed


USER, ASSISTANT = ("user", "a"), ("assistant", "b")
LINE = json.dumps(ROW).encode() + b"\n"
BAD_ROWS = [
    (b"", "the file is empty"),
    (LINE + b"\n" + LINE, "line 2 is empty"),
    (LINE + b"\r\n", "line 2 is empty"),
    (LINE + b'{"input": \n', "line 2 is not JSON"),
    (LINE + b"[1]\n", "line 2 is not a JSON object"),
    (b"[" * 10**5 + b"]" * 10**5, "line 1 is not JSON (nested too deeply)"),
    (b'{"input": "a", "output": "b", "n": ' + b"9" * 10**4 + b"}", "line 1 is not JSON"),
    (LINE.decode().encode("utf-16"), "the file is in UTF-16, save it as UTF-8"),
    (LINE.decode().encode("utf-16-le"), "line 1 is not JSON"),
    (LINE + '{"input": "é", "output": "b"}'.encode("latin-1"), "line 2 is not UTF-8 text"),
    (LINE + b"\xef\xbb\xbf" + LINE, "line 2 is not JSON"),
    (b'{"input": "\\ud800", "output": "b"}', "half a surrogate pair"),
    (b'{"input": "a", "output": "\\udc00"}', "half a surrogate pair"),
    ({"input": "", "output": ""}, "there is no text before 'output'"),
    ({"input": " \n", "output": "b"}, "there is no text before 'output'"),
    ({"input": None, "output": "b"}, "'input' is null; it must be text"),
    ({"input": ["a"], "output": "b"}, """'input' is ["a"]; it must be text"""),
    ({"input": "a", "output": 3.5}, "'output' is 3.5; it must be text"),
    ({"input": "a"}, "has no field 'output'"),
    (b'{"input": "' + b"a" * (17 * 2**20) + b'", "output": "b"}', "has more than 16 MiB"),
]
BAD_CHAT = [
    (ROW, "has neither 'messages' nor 'conversations'"),
    (CHAT | NEMO, "has both 'messages' and 'conversations'"),
    (
        (json.dumps(CHAT) + "\n" + json.dumps(NEMO)).encode(),
        "line 2 has 'conversations', line 1 has 'messages'",
    ),
    ({"messages": None}, "'messages' must be a list"),
    ({"messages": []}, "'messages' must be a list"),
    ({"messages": {"role": "user"}}, "'messages' must be a list"),
    ({"messages": ["a"]}, 'message 1 is "a"'),
    (messages(USER, ("asistant", "b")), "did you mean 'assistant'"),
    (messages(USER, (None, "b")), "the role of message 2 is null"),
    (messages(USER, (["assistant"], "b")), "the role of message 2 is"),
    (messages(("tool", "a"), ASSISTANT), "Valid: system, user, assistant"),
    (messages(USER, ("assistant", None)), "the content of message 2 is null"),
    (messages(USER, ("assistant", [{"type": "text", "text": "b"}])), "it must be text"),
    (messages(USER, ("assistant", " ")), "the content of message 2 (assistant) is empty"),
    (messages(("user", ""), ASSISTANT), "the content of message 1 (user) is empty"),
    (messages(USER), "there is no message of the assistant"),
    (messages(ASSISTANT, USER, ASSISTANT), "begin with the user"),
    (messages(("system", "a"), ASSISTANT), "begin with the user"),
    (messages(USER, ("system", "a"), ASSISTANT), "only the first message can be"),
    (b'{"messages": [{"role": "user", "content": "\\ud800"}, {"role": "assistant", "content": "b"}]}', "surrogate"),
    ({"conversations": NEMO["conversations"]}, "has no 'system'"),
    (conversation(system=None), "'system' is null"),
    (conversation(conversations=[]), "'conversations' must be a list"),
    (conversation(conversations=["a"]), 'turn 1 is "a"'),
    (conversation(conversations=[{"from": "User"}]), "'value' of turn 1 is null"),
    (conversation(conversations=[{"from": "", "value": "a"}]), "'from' of turn 1 is empty"),
    (conversation(mask="Human"), "'mask' is 'Human', who does not speak"),
    (conversation(mask=7), "'mask' is 7; it must be text"),
    (conversation(mask="User,Assistant"), "every turn is masked"),
    (conversation(type="TEXT"), "'type' is \"TEXT\"; Valid"),
]


@pytest.mark.parametrize(
    ("rows", "message", "chat"),
    [(rows, message, False) for rows, message in BAD_ROWS] + [(rows, message, True) for rows, message in BAD_CHAT],
    ids=lambda value: value if isinstance(value, str) else "",
)
def test_a_bad_row_ends_in_one_line(job, rows, message, chat):
    line = refusal(job, {"model.data.chat": chat}, rows)
    assert message in line and f"{TRAIN}.file_names='rows.jsonl'" in line and len(line) < 500


@pytest.mark.slow
def test_the_script_ends_with_the_line_and_exit_code_2(tmp_path):
    (tmp_path / "rows.jsonl").write_bytes(b'{"input": "\\ud800", "output": "b"}\n')
    (tmp_path / "sound.jsonl").write_text(json.dumps({"input": "In line: Emma Ben", "output": "Vera"}) + "\n")
    files = "model.data.train_ds.file_names=[{0}] model.data.validation_ds.file_names=[{0}]"
    sizes = "model.global_batch_size=1 model.micro_batch_size=1"
    short = "model.data.train_ds.max_seq_length=2 model.data.validation_ds.tokens_to_generate=1 trainer.max_steps=1"
    cases = {
        "exp_manager.name=7": "exp_manager.name=7: must be text",
        "trainer.max_steps=0": "trainer.max_steps=0: must be a whole number",
        files.format("rows.jsonl"): "half a surrogate pair",
        # Known only to the tokenizer, so after the base is loaded.
        f"{files.format('sound.jsonl')} {sizes} {short}": (
            "model.data.validation_ds.max_seq_length=2: no room for a prompt and its answer: line 1 of sound.jsonl"
        ),
    }
    for overrides, message in cases.items():
        code, out, err = forked.script(SCRIPT, *overrides.split(), cwd=tmp_path)
        assert code == 2 and not out, (overrides, err)
        assert message in err and err.startswith("error: ") and err.count("\n") == 1, (overrides, err)
