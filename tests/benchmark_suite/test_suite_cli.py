"""The suite's command."""

import json
import subprocess
import sys

import pytest
from typer.testing import CliRunner

import benchmark_suite
from benchmark_suite import cli, declared
from nemo_tiedlora.errors import UsageError


def run(*arguments):
    return CliRunner().invoke(cli.app, list(arguments), catch_exceptions=False).output


def test_list_names_everything():
    assert {line.split()[0] for line in run("list").splitlines()} >= set(benchmark_suite.list_tasks("smoke"))
    glue = json.loads(run("list", "--group", "glue", "--json"))
    assert [each["id"] for each in glue] == benchmark_suite.list_tasks("glue")
    assert [each["name"] for each in json.loads(run("list", "variants", "--json"))] == benchmark_suite.list_variants()


def test_show_gives_a_spec_that_can_be_read_back(tmp_path, data_root):
    (tmp_path / "shown.yaml").write_text(run("show", "boolq-v1"))
    shown = declared.read(tmp_path / "shown.yaml")
    assert benchmark_suite.TaskSpec.from_dict(shown) == benchmark_suite.spec("boolq-v1")
    example = json.loads(run("show", "boolq-v1", "--data-root", str(data_root), "--json"))["example"]
    assert example["prompt"].startswith("The tower is made of stone.\nQuestion:") and example["target"] == "no"
    assert json.loads(run("show", "TL6", "--json"))["settings"] == {"preset": "TL6"}
    assert "example" in json.loads(run("show", "before-v1", "--json"))


def test_mistakes_are_one_line_and_exit_code_2():
    with pytest.raises(UsageError, match="did you mean 'gsm8k-v1'"):
        run("show", "gsm8k-v2")
    command = [sys.executable, "-m", "benchmark_suite", "show", "gsm8k-v2"]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 2 and done.stderr.startswith("error: task='gsm8k-v2'") and done.stderr.count("\n") == 1
