"""Hosts by name: what each refuses, one of a user's own, and the command without NeMo."""

import json
import shutil
import subprocess
import sys
from contextlib import contextmanager
from pathlib import Path
from types import SimpleNamespace

import hf_cells
import pytest
import torch
from report_results import write
from safetensors.torch import load_file, save_file

from benchmark_suite import backends, registry
from benchmark_suite.report.summary import summarize
from benchmark_suite.runner import sweep as sweeping
from nemo_tiedlora.errors import UsageError

ROOT = Path(__file__).parents[2]
TINY = {"steps": 2, "batch_size": 4, "max_seq_length": 40}
COMMAND = """
import runpy, sys
sys.argv = {arguments!r}
try:
    runpy.run_module("benchmark_suite", run_name="__main__")
finally:
    there = {{"nemo", "megatron", "lightning"}} & {{name.partition(".")[0] for name in sys.modules}}
    assert not there, there
"""


def run(*arguments):
    """The command, in a process that must not import NeMo."""
    code = COMMAND.format(arguments=["benchmark_suite", *map(str, arguments)])
    return subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, timeout=300)


@pytest.mark.slow
def test_the_command_trains_without_nemo(models, data_root, tmp_path):
    variants = ["LoRA", "DynaLoRA", "PEFT VeRA"]
    done = run("sweep", "--host", "hf", "--base", models("roberta"), "--tasks", "mrpc-v1,stsb-v1",
               "--variants", ",".join(variants), "--steps", 2, "--limit", 4, "--lrs", "1e-2", "--max-seq-length", 40,
               "--data-root", data_root, "--results", tmp_path, "--json")  # fmt: skip
    assert done.returncode == 0, done.stderr[-2000:]
    found = json.loads(done.stdout)["results"]
    assert [(result["task"], result["variant"]) for result in found] == [
        (task, variant) for task in ("mrpc-v1", "stsb-v1") for variant in variants
    ]
    for result in found:
        assert result["status"] == "done" and result["host"] == "hf" and result["head"], result["error"]
    assert done.stderr == ""  # nothing of new heads and the like


CASES = {
    "host": (("hff", "llama", "TL6", "before-v1", None), "host='hff': did you mean 'hf'?"),
    "a name": (("hf", "builtin", "TL6", "before-v1", None), "base='builtin': host hf trains on the folder"),
    "NeMo's own": (("hf", "llama", "NeMo LoRA", "before-v1", None), "NeMo LoRA.scheme='lora': lora is NeMo's own"),
    "PEFT on NeMo": (
        ("nemo", "llama", "PEFT VeRA", "before-v1", None),
        "peft:vera is Hugging Face PEFT's, which is on",
    ),
    "an encoder that writes": (("hf", "roberta", "TL6", "gsm8k-v1", None), "task='gsm8k-v1': it has no head"),
    "an encoder with --text": (("hf", "roberta", "TL6", "mrpc-v1", False), "an encoder, which does not write"),
    "a head on NeMo": (("nemo", "llama", "TL6", "mrpc-v1", True), "head=True: on host nemo models learn text only"),
    "an encoder on NeMo": (("nemo", "roberta", "TL6", "mrpc-v1", None), "; --host hf trains on it without NeMo"),
    "an encoder-decoder": (("hf", "t5", "TL6", "before-v1", None), "is an encoder-decoder, which is not trained here"),
    "a rank": (("hf", "roberta", "LoRA", "mrpc-v1", None), "LoRA.rank=500: larger than the layer"),
}


@pytest.mark.parametrize("case", CASES)
def test_what_does_not_fit_is_said_before_anything_is_trained(models, data_root, case):
    (host, base, variant, task, head), message = CASES[case]
    folder = base if base == "builtin" else models(base)
    with pytest.raises(UsageError) as error:
        on = backends.backend(host, folder)
        tasks = sweeping.tasks_named([task], data_root, 4)
        chosen = sweeping.variants_named([variant], on)
        sweeping.matrix(tasks, chosen, on, [500] if case == "a rank" else None, [0], None, 4, head)
    assert message in str(error.value) and "\n" not in str(error.value)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"auto_map": {"AutoConfig": "own.Config"}, "model_type": "own"}, "cannot load it"),
        ({"model_type": "vit"}, "neither writes nor reads text"),
        ("weights", "there is no .safetensors in it"),
        ("pickle", "there is no .safetensors in it"),
        ("damaged", "cannot load it"),
        ("a tensor", "model.norm.weight is missing in its weights"),
    ],
)
def test_folders_that_cannot_be_loaded_are_refused_and_nothing_in_them_is_run(models, tmp_path, change, message):
    folder = shutil.copytree(models("llama"), tmp_path / "model")
    marker = tmp_path / "was run"
    (folder / "own.py").write_text(f"open({str(marker)!r}, 'w')")
    weights = folder / "model.safetensors"
    if isinstance(change, dict):
        config = json.loads((folder / "config.json").read_text())
        (folder / "config.json").write_text(json.dumps(config | {"architectures": ["Own"]} | change))
    elif change == "damaged":
        weights.write_bytes(weights.read_bytes()[:1000])
    elif change == "a tensor":
        tensors = load_file(weights)
        del tensors["model.norm.weight"]
        save_file(tensors, weights, {"format": "pt"})
    else:
        weights.unlink()
        if change == "pickle":
            torch.save({}, folder / "pytorch_model.bin")
    with pytest.raises(UsageError, match=message) as error:
        backends.backend("hf", folder).folder.load(None, "32")
    assert "\n" not in str(error.value) and not marker.exists()


def test_every_variant_for_a_host_is_all(models):
    for host in ("hf", "nemo"):
        on = backends.backend(host, models("llama"))
        names = {variant.name for variant in sweeping.variants_named(["all"], on)}
        assert ("PEFT LoRA" in names) is (host == "hf") and ("NeMo LoRA" in names) is (host == "nemo")
        assert {"TL6", "full"} <= names


def test_the_base_is_known_by_its_content(models, tmp_path):
    folder = shutil.copytree(models("llama"), tmp_path / "other name")
    before = backends.backend("hf", folder).base_sha256
    assert before == backends.backend("hf", models("llama")).base_sha256
    (folder / "README.md").write_text("Nothing that a model is made of.")
    assert backends.backend("hf", folder).base_sha256 == before
    settings = json.loads((folder / "tokenizer_config.json").read_text())
    (folder / "tokenizer_config.json").write_text(json.dumps(settings | {"model_max_length": 7}))
    assert backends.backend("hf", folder).base_sha256 != before


class Echo:
    """A host on which nothing is learned, and the answer is the prompt."""

    host = "echo"

    def __init__(self, base, precision):
        self.base, self.base_sha256, self.precision = str(base), "0", precision

    def __exit__(self, *exception):
        pass

    def loggers(self):
        return ()

    def packages(self, variant):
        return ("torch",)

    def runs(self, variant):
        return True

    def has_head(self, task, wanted):
        return False

    def check(self, variant, rank, head):
        pass

    def load(self, training):
        pass

    @contextmanager
    def trained(self, training, weights=None, progress=None):
        facts = SimpleNamespace(steps=training.recipe.steps, best_step=1, seconds=1.0, tokens=10, losses=[(1, 2.0)])
        yield SimpleNamespace(
            facts=facts, trainable={"a": torch.zeros(3)}, sizes={"trainable": 3, "stored": 3, "percent_of_lora": 1.0},
            save=lambda folder: 12, generate=lambda prompts, tokens: list(prompts),
        )  # fmt: skip


def test_a_host_of_ones_own(tmp_path, monkeypatch):
    monkeypatch.setattr(backends, "BACKENDS", dict(backends.BACKENDS))
    backends.register("echo", Echo)
    with pytest.raises(UsageError, match="host='echo': registered already"):
        backends.register("echo", Echo)
    (found,), (cell,) = hf_cells.swept("mine", tmp_path, ["TL6"], ["before-v1"], host="echo", **TINY)
    assert (found["status"], found["host"], found["base"], found["trainable"]) == ("done", "echo", "mine", 3)
    row = json.loads((cell.folder(tmp_path) / "predictions.jsonl").open().readline())
    assert row["prediction"] == registry.load_task("before-v1", limit=1).examples("test")[0].prompt


def test_an_installed_package_can_have_a_host(monkeypatch):
    monkeypatch.setattr(backends, "BACKENDS", dict(backends.BACKENDS))
    installed = [SimpleNamespace(name="echo", load=lambda: Echo)]
    monkeypatch.setattr(backends, "entry_points", lambda group: installed if group == backends.ENTRY_POINTS else [])
    assert isinstance(backends.backend("echo", "mine"), Echo)


def test_hosts_and_heads_are_never_in_one_table(tmp_path):
    for host, head in (("hf", True), ("hf", False), ("nemo", False)):
        for variant in ("LoRA", "TL6"):
            write(tmp_path / f"{host}{head}{variant}", [1, 0], variant=variant, host=host, head=head)
    summary = summarize(tmp_path)
    named = {chapter.section.base for chapter in summary.chapters}
    assert named == {"tiny.nemo on hf, heads", "tiny.nemo on hf, text", "tiny.nemo on nemo, text"}
    assert summary.facts["Host"] == "hf, nemo"
    for chapter in summary.chapters:
        assert len(chapter.section.cells) == 2
