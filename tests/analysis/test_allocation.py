"""The allocation heat map: its numbers, its picture, and the command."""

import json

import pytest
from typer.testing import CliRunner

from nemo_tiedlora import cli, variants
from nemo_tiedlora.analysis import allocation
from nemo_tiedlora.errors import UsageError

LOG = {
    "modules": ["attention_qkv.0", "attention_qkv.1", "mlp_fc2.1", "mlp_fc2.3"],
    "active_steps": [100, 0, 50, 7],
    "log": [{"step": 0, "active": ["attention_qkv.0"], "importance": {}}],
}


def analyze(*arguments):
    return CliRunner().invoke(cli.app, ["analyze", "allocation", *map(str, arguments)], catch_exceptions=False)


def test_the_command_writes_the_numbers_and_the_picture(tmp_path):
    (tmp_path / "log.json").write_text(json.dumps(LOG))
    out = tmp_path / "new" / "figure.png"
    printed = json.loads(analyze(tmp_path / "log.json", "--out", out, "--json").output)
    assert printed == json.loads(out.with_suffix(".json").read_text()) == {
        "targets": ["attention_qkv", "mlp_fc2"],
        "layers": [0, 1, 3],
        "active_steps": [[100, None], [0, 50], [None, 7]],
    }  # fmt: skip
    assert out.read_bytes().startswith(b"\x89PNG")
    summary = analyze(tmp_path / "log.json", "--out", out).output
    assert "100 active steps" in summary and "57 active steps" in summary and "figure.png" in summary


def test_a_log_of_dynalora_is_read(tmp_path):
    dynamic = variants.build(variants.DynamicConfig(active=1, period=2, allocator="random"), 2)
    dynamic.start([variants.Site(target, layer, 8, 8) for target in ("attention_qkv", "mlp_fc2") for layer in (0, 1)])
    for _ in range(20):
        dynamic.advance()
    state = dynamic.state_dict()
    log = {"modules": list(dynamic.log[0].importance), "active_steps": state["active_steps"], "log": state["log"]}
    (tmp_path / "log.json").write_text(json.dumps(log))
    read = allocation.read(tmp_path / "log.json")
    expected = [[0, 0], [0, 0]]
    for choice in dynamic.log[:-1]:  # one module at a time, two steps each
        target, layer = choice.active[0].split(".")
        expected[int(layer)][["attention_qkv", "mlp_fc2"].index(target)] += 2
    assert (read.targets, read.layers, read.active_steps) == (["attention_qkv", "mlp_fc2"], [0, 1], expected)


@pytest.mark.parametrize(
    "content",
    [
        "{",
        "[]",
        "{}",
        '{"modules": [], "active_steps": []}',
        '{"modules": ["attention_qkv.0"], "active_steps": [1, 2]}',
        '{"modules": ["attention_qkv"], "active_steps": [1]}',
        '{"modules": ["attention_qkv.x"], "active_steps": [1]}',
        '{"modules": ["attention_qkv.0"], "active_steps": ["1"]}',
        '{"modules": ["attention_qkv.0"], "active_steps": [-1]}',
        '{"modules": [3], "active_steps": [1]}',
        '{"modules": null, "active_steps": [1]}',
    ],
)
def test_something_else_is_refused(tmp_path, content):
    (tmp_path / "log.json").write_text(content)
    with pytest.raises(UsageError, match="not an allocation log"):
        allocation.read(tmp_path / "log.json")


def test_bad_files_are_refused(tmp_path):
    (tmp_path / "log.json").write_text(json.dumps(LOG))
    for arguments, message in [
        (["missing.json"], "no such file"),
        ([tmp_path / "log.json", "--out", tmp_path / "figure.jpg"], "must end in .png"),
        ([tmp_path / "log.json", "--out", tmp_path / "log.png"], "would replace the log"),
    ]:
        with pytest.raises(UsageError, match=message):
            analyze(*arguments)
    assert json.loads((tmp_path / "log.json").read_text()) == LOG
