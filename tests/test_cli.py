"""The ``tiedlora`` command."""

import json
import subprocess
import sys
from pathlib import Path

import pytest
from typer.testing import CliRunner

from nemo_tiedlora import __version__, cli
from nemo_tiedlora.errors import UsageError

ROOT = Path(__file__).parents[1]
LLAMA = ["--layers", "32", "--hidden", "4096", "--heads", "32", "--ffn", "11008"]
PUBLISHED_GROUPS = "[[16,17],[18,19],[20,21,22],[23,24,25,26,27],[28,29,30]]"
EVERY = "attention_q,attention_k,attention_v,mlp_up,mlp_down"


def params(*arguments):
    result = CliRunner().invoke(cli.app, ["params", "--json", *arguments], catch_exceptions=False)
    return json.loads(result.output)


def test_params_of_the_published_configurations():
    assert params("--preset", "TL6", *LLAMA)["trainable"] == 524_544
    vera = params("--scheme", "vera", *LLAMA)
    assert (vera["trainable"], vera["stored"], vera["total"]) == (393_472, 393_472, 524_544)
    assert vera["percent_of_lora"] == 9.38 and vera["bytes"] == 4 * 393_472
    assert params("--preset", "LoRA", "--targets", EVERY, *LLAMA)["trainable"] == 14_024_704
    shared = ["--scheme", "share_lora", "--groups", PUBLISHED_GROUPS, "--rank-expansion", "9", "--targets", EVERY]
    assert params(*shared, *LLAMA)["trainable"] == 10_847_232
    roberta = ["--layers", "12", "--hidden", "768", "--heads", "12", "--targets", "attention_q,attention_v"]
    assert params("--scheme", "cond_lora", *roberta)["trainable"] == 24_576


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--preset", "TL66", *LLAMA], "did you mean 'TL6'"),
        (["--scheme", "tied_lra", *LLAMA], "did you mean 'tied_lora'"),
        (["--rank", "0", *LLAMA], "rank=0"),
        (["--targets", "attention_x", *LLAMA], "target_modules='attention_x'"),
        (["--layers", "2"], "hidden=None"),
        (["--layers", "2", "--hidden", "64", "--query-groups", "2"], "heads=None"),
        (["--layers", "2", "--hidden", "64", "--heads", "3"], "heads=3: must divide hidden"),
        (["--scheme", "share_lora", "--groups", "[[0,1", *LLAMA], "write lists as JSON"),
        (["--base", "missing.nemo"], "base='missing.nemo': no such file"),
        (["--scheme", "cond_lora", "--preset", "TL1", *LLAMA], "preset='TL1': unknown setting"),
    ],
)
def test_bad_input_is_named(arguments, message):
    with pytest.raises(UsageError) as error:
        CliRunner().invoke(cli.app, ["params", *arguments], catch_exceptions=False)
    assert message in str(error.value)


def test_bad_input_is_one_line_and_exit_code_2():
    command = [sys.executable, "-m", "nemo_tiedlora.cli", "inspect", "missing.nemo"]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 2 and done.stderr == "error: adapter='missing.nemo': no such file\n" and not done.stdout


def test_help_imports_neither_torch_nor_nemo():
    code = "import sys; from nemo_tiedlora import cli; sys.exit('torch' in sys.modules or 'nemo' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code]).returncode == 0


def test_the_version_is_the_same_everywhere_and_asking_imports_no_torch():
    code = (
        "import sys; sys.argv = ['tiedlora', '--version']; from nemo_tiedlora import cli\n"
        "try: cli.main()\nfinally: assert 'torch' not in sys.modules"
    )
    asked = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert asked.returncode == 0 and asked.stdout == f"tiedlora {__version__}\n", asked.stderr
    packed = subprocess.run([sys.executable, "setup.py", "--version"], cwd=ROOT, capture_output=True, text=True)
    assert packed.stdout.splitlines()[-1] == __version__, packed.stderr
