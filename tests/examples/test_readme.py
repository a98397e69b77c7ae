"""Every command and every number of the README, as a newcomer would meet them."""

import json
import re
import subprocess
from pathlib import Path

import pytest
import toy

from nemo_tiedlora.variants import PRESETS, Site, TiedConfig, build, count

ROOT = Path(__file__).parents[2]
README = (ROOT / "README.md").read_text()
#: Run by other means: this test is part of `make test`, and a script cannot activate its caller's environment.
ELSEWHERE = {"source .venv/bin/activate"}


def commands():
    return [
        block.strip() for block in re.findall(r"```bash\n(.*?)```", README, re.DOTALL) if block.strip() not in ELSEWHERE
    ]


@pytest.fixture
def checkout(tmp_path):
    """A folder that looks like the checkout and takes what runs leave behind."""
    for entry in ROOT.iterdir():
        if entry.name not in {".git", "nemo_experiments", "runs"}:
            (tmp_path / entry.name).symlink_to(entry)
    return tmp_path


@pytest.mark.slow
def test_every_command_runs_and_both_examples_learn(checkout):
    environment = toy.FRESH | {"PATH": f"{ROOT / '.venv' / 'bin'}:{toy.FRESH['PATH']}"}
    for command in commands():
        done = subprocess.run(
            ["bash", "-euc", command], cwd=checkout, env=environment, capture_output=True, text=True, timeout=1200
        )
        assert done.returncode == 0, f"{command}\n{done.stdout[-2000:]}\n{done.stderr[-2000:]}"
        assert "NeMo I" not in done.stdout + done.stderr and "NeMo W" not in done.stderr, done.stderr[-2000:]
        if command == "make demo":
            summary = json.loads((checkout / done.stdout.splitlines()[-1]).read_text())
            assert summary["metric_before"] < 0.1 and summary["metric_after"] > 0.9
            assert Path(summary["adapter"]).is_file()
            keys = {"scheme", "trainable", "percent_of_lora", "seconds", "tokens_per_second"}
            assert keys <= set(summary)
        if "exp_manager.name=queue" in command:
            summary = json.loads((checkout / "runs" / "queue" / "summary.json").read_text())
            assert summary["metric_before"] < 0.1 and summary["metric_after"] > 0.95
            kept = [*(checkout / "runs").rglob("*.ckpt"), *(checkout / "runs").rglob("*.nemo")]
            assert len(kept) > 1 and all(path.name.startswith("queue") for path in kept)
        if "generate" in command:
            prompt, completion = done.stdout.split("?")
            assert prompt == "In line: Kate Leo Ida Ben Hugo. Who is last" and completion.strip() == "Hugo"


def test_the_table_of_layouts_is_made_from_its_file():
    from measure import table

    measured = json.loads((ROOT / "docs" / "parallelism.json").read_text())
    assert table(measured) in (ROOT / "docs" / "parallelism.md").read_text()


def test_the_table_of_presets_is_the_counted_one():
    sites = [Site("attention_qkv", layer, 4096, 12288) for layer in range(32)]
    lora = count(build(TiedConfig(preset="LoRA"), 32), sites).trainable
    for preset in PRESETS:
        config = TiedConfig(preset=preset)
        trainable = count(build(config, 32), sites).trainable
        tied = ", ".join(config.tie) or "–"
        row = f"| {preset} | {', '.join(config.train)} | {tied} | {trainable:,} | {100 * trainable / lora:.1f} % |"
        assert row in README
