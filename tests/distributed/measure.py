"""Writes docs/parallelism.json: how far every layout's training is from one process's, measured now.

    python tests/distributed/measure.py

The table of docs/parallelism.md is made from that file; a test compares them.
"""

import json
import sys
import tempfile
from pathlib import Path

ROOT = Path(__file__).parents[2]
sys.path[:0] = [str(ROOT / "tests")]
METHODS = ["LoRA", "TL6", "VeRA", "ShareLoRA", "CondLoRA", "DynaLoRA"]


def measure(folder: Path) -> dict[str, dict[str, float]]:
    """Layout → method → the largest relative difference of a loss from that of one process."""
    import toy
    import world
    from test_layouts import CASES, LAYOUTS

    from nemo_tiedlora import platform

    with platform.host(), toy.clean_megatron():
        base = toy.save_base(toy.llama_config(toy.tokenizer(folder)), folder / "llama.nemo")
    files = {
        "train": toy.sums(folder / "train.jsonl", 200),
        "validation": toy.sums(folder / "validation.jsonl", 8, seed=1),
        "base": base,
    }
    cases = {name: CASES[name] for name in METHODS}
    alone = world.run(folder / "alone", cases, files, 1, {})
    found: dict[str, dict[str, float]] = {}
    for layout, (processes, overrides) in LAYOUTS.items():
        records = world.run(folder / layout.replace(" ", ""), cases, files, processes, overrides)
        found[layout] = {}
        for name in METHODS:
            pairs = zip(records[name][0]["losses"], alone[name][0]["losses"], strict=True)
            found[layout][name] = max(abs(ours - theirs) / abs(theirs) for ours, theirs in pairs)
    return found


def table(found: dict[str, dict[str, float]]) -> str:
    """As Markdown."""
    lines = [f"| layout | {' | '.join(METHODS)} |", f"|---|{'---:|' * len(METHODS)}"]
    lines += [f"| {layout} | {' | '.join(f'{row[name]:.0e}' for name in METHODS)} |" for layout, row in found.items()]
    return "\n".join(lines)


if __name__ == "__main__":
    with tempfile.TemporaryDirectory() as scratch:
        result = measure(Path(scratch))
    (ROOT / "docs" / "parallelism.json").write_text(json.dumps(result, indent=1) + "\n")
    print(table(result))
