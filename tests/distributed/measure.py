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


def measure(folder: Path) -> dict[str, dict[str, float]]:
    """Layout → case → the largest relative difference of a loss from that of one process."""
    import toy
    import world
    from test_layouts import CASES, LAYOUTS, REFUSED

    from nemo_tiedlora import platform

    with platform.host(), toy.clean_megatron():
        base = toy.save_base(toy.llama_config(toy.tokenizer(folder)), folder / "llama.nemo")
    files = toy.rows(folder) | {"base": base}
    cases = {name: case for name, case in CASES.items() if name != "TL6 with dropout"}  # random numbers differ
    alone = world.run(folder / "alone", cases, files, 1, {})
    found: dict[str, dict[str, float]] = {}
    for layout, (processes, overrides) in LAYOUTS.items():
        possible = {name: case for name, case in cases.items() if name not in REFUSED.get(layout, [])}
        records = world.run(folder / layout.replace(" ", ""), possible, files, processes, overrides)
        found[layout] = {}
        for name in possible:
            pairs = zip(records[name][0]["losses"], alone[name][0]["losses"], strict=True)
            found[layout][name] = max(abs(ours - theirs) / abs(theirs) for ours, theirs in pairs)
    return found


def table(found: dict[str, dict[str, float]]) -> str:
    """As Markdown; what is refused under a layout is left empty."""
    lines = [f"| | {' | '.join(found)} |", f"|---|{'---:|' * len(found)}"]
    for name in found["TP2"]:
        row = [f"{layout[name]:.0e}" if name in layout else "" for layout in found.values()]
        lines.append(f"| {name} | {' | '.join(row)} |")
    return "\n".join(lines)


if __name__ == "__main__":
    with tempfile.TemporaryDirectory() as scratch:
        result = measure(Path(scratch))
    (ROOT / "docs" / "parallelism.json").write_text(json.dumps(result, indent=1) + "\n")
    print(table(result))
