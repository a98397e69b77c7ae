"""The scores of single test examples, which is what variants are compared by."""

import json
import math
from statistics import fmean

from benchmark_suite.report.cells import Cell


class Unpaired(ValueError):
    """Why there are no scores of single examples to compare."""


def scores(cell: Cell) -> dict[str, float]:
    """The primary metric of every test example by its id, in the units of the cell's metric.

    Raises:
        Unpaired: the file is missing or broken, or the metric is no mean over examples (BLEU, a correlation).
    """
    found: dict[str, float] = {}
    try:
        with (cell.folder / "predictions.jsonl").open(encoding="utf-8") as lines:
            for line in lines:
                example = json.loads(line)
                found[str(example["id"])] = float(example["scores"][cell.primary])
    except KeyError as error:
        raise Unpaired(f"no {error} per example") from None
    except FileNotFoundError:
        raise Unpaired("no predictions") from None
    except (ValueError, TypeError, OSError):
        raise Unpaired("broken predictions") from None
    if len(found) != cell.test.count:
        raise Unpaired(f"{len(found)} predictions for {cell.test.count} examples")
    scale = _scale(fmean(found.values()) if found else math.nan, cell.test.value)
    return {at: scale * score for at, score in found.items()}


def _scale(mean: float, value: float) -> float:
    for scale in (1.0, 100.0):  # metrics are given as fractions or in percent, to two decimals at least
        if math.isclose(scale * mean, value, rel_tol=1e-6, abs_tol=0.00501 * scale / 100):
            return scale
    raise Unpaired("not a mean over examples")
