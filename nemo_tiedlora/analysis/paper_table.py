"""The parameter columns, P%, of the Tied-LoRA paper's table 2 (arXiv 2311.09578v2), from shapes alone.

The table gives every method twice for each base model and task: at the rank at which LoRA scored best, and at the rank
at which the method itself did. P% is always a share of the trainable parameters of LoRA at *LoRA's* best rank on that
task ("the parameter count of the best-performing LoRA configuration", section 4): in the second part of the table it is
not a share of LoRA of the same rank.
"""

import math
from collections.abc import Iterator
from typing import NamedTuple

from nemo_tiedlora.variants import Site, TiedConfig, build, count

TASKS = ("DialogSum", "GSM8K", "HellaSwag", "IWSLT 2017", "SQuAD")
#: Layers and hidden size; the fused QKV projection of both has 3 · hidden rows.
BASES = {"LLaMA2 7B": (32, 4096), "GPT-2B-001": (24, 2048)}
#: Base model → method → the rank at which it scored best on each task.
BEST_RANKS = {
    "LLaMA2 7B": {
        "LoRA": (8, 64, 16, 8, 2),
        "VeRA": (64, 16, 2, 16, 2),
        "TL1": (16, 16, 4, 64, 2),
        "TL2": (64, 16, 2, 128, 2),
        "TL3": (8, 4, 8, 16, 8),
        "TL4": (16, 8, 4, 16, 4),
        "TL5": (8, 64, 16, 16, 4),
        "TL6": (16, 64, 64, 32, 4),
    },
    "GPT-2B-001": {
        "LoRA": (4, 64, 64, 128, 32),
        "VeRA": (8, 2, 2, 2, 2),
        "TL1": (8, 4, 4, 2, 2),
        "TL2": (8, 4, 2, 2, 4),
        "TL3": (16, 8, 4, 4, 4),
        "TL4": (32, 32, 4, 8, 8),
        "TL5": (8, 128, 32, 64, 16),
        "TL6": (32, 16, 32, 128, 64),
    },
}


#: What the paper prints where it does not round what its own formulas (table 1) give, in 7 of 150 places.
PRINTED = {
    # Cut off, or u not counted: 2.356 and 5.351 %.
    ("GPT-2B-001", "LoRA", "VeRA", "SQuAD"): 2.3,
    ("GPT-2B-001", "LoRA", "TL6", "GSM8K"): 5.3,
    ("GPT-2B-001", "LoRA", "TL6", "HellaSwag"): 5.3,
    # 38.287 %, which the paper itself gives as 38.3 for the same rank in its first part.
    ("LLaMA2 7B", "TL2", "TL2", "SQuAD"): 38.2,
    # 0.016 %: the paper has nothing below 0.1.
    ("GPT-2B-001", "TL1", "TL1", "IWSLT 2017"): 0.1,
    # 20.858 and 10.701 %: no reading of the formulas gives what is printed.
    ("GPT-2B-001", "TL2", "TL2", "DialogSum"): 20.1,
    ("GPT-2B-001", "TL6", "TL6", "SQuAD"): 10.8,
}


class Cell(NamedTuple):
    """One P% of the table, at the best rank of ``rank_of``: ``LoRA`` or the method itself; and what the paper prints,
    where that is something else."""

    base: str
    rank_of: str
    method: str
    task: str
    rank: int
    percent: float
    printed: float | None


def cells() -> Iterator[Cell]:
    """Every P% of the table, in its order."""
    for base, best in BEST_RANKS.items():
        same_rank = [(method, "LoRA") for method in best]
        own_rank = [(method, method) for method in best if method != "LoRA"]
        for method, rank_of in same_rank + own_rank:
            for task, rank, lora_rank in zip(TASKS, best[rank_of], best["LoRA"], strict=True):
                percent = 100 * _trainable(base, method, rank) / _trainable(base, "LoRA", lora_rank)
                printed = PRINTED.get((base, rank_of, method, task))
                yield Cell(base, rank_of, method, task, rank, percent, printed)


def _trainable(base: str, method: str, rank: int) -> int:
    layers, hidden = BASES[base]
    sites = [Site("attention_qkv", layer, hidden, 3 * hidden) for layer in range(layers)]
    return count(build(TiedConfig(preset=method, rank=rank), layers), sites).trainable


def markdown() -> str:
    """The table in Markdown: rank and P% for each task, and in brackets what the paper prints instead."""
    rows: dict[tuple[str, str, str], list[str]] = {}
    for cell in cells():
        row = rows.setdefault((cell.base, cell.rank_of, cell.method), [cell.base, cell.method, cell.rank_of])
        rounded = math.floor(10 * cell.percent + 0.5) / 10  # half up, as the paper rounds 6.25
        row += [str(cell.rank), f"{rounded}" if cell.printed is None else f"{rounded} (printed: {cell.printed})"]
    head = ["Base model", "Method", "Best rank of", *(f"{task} {column}" for task in TASKS for column in ("r", "P%"))]
    rule = ["---"] * 3 + ["--:"] * 2 * len(TASKS)
    return "".join(f"| {' | '.join(line)} |\n" for line in (head, rule, *rows.values()))
