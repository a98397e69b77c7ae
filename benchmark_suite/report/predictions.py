"""What single test examples add to a cell's score, which is what variants are compared by."""

import json
from collections.abc import Callable

import numpy

from benchmark_suite.metrics import METRICS
from benchmark_suite.report.cells import Cell


class Unpaired(ValueError):
    """Why there are no scores of single examples to compare."""


def scores(cell: Cell) -> dict[str, numpy.ndarray]:
    """What every test example, by its id, adds to the sums that ``value`` makes the primary metric of.

    Raises:
        Unpaired: the file is missing or broken, or the metric knows no such sums (a rank correlation).
    """
    found: dict[str, numpy.ndarray] = {}
    try:
        with (cell.folder / "predictions.jsonl").open(encoding="utf-8") as lines:
            for line in lines:
                example = json.loads(line)
                own = example["scores"][cell.primary]
                found[str(example["id"])] = numpy.array(own if isinstance(own, list) else [own, 1.0], dtype=float)
    except KeyError as error:
        raise Unpaired(f"no {error} per example") from None
    except FileNotFoundError:
        raise Unpaired("no predictions") from None
    except (ValueError, TypeError, OSError):
        raise Unpaired("broken predictions") from None
    if len(found) != cell.test.count:
        raise Unpaired(f"{len(found)} predictions for {cell.test.count} examples")
    try:
        sums = numpy.stack(list(found.values())).sum(0, keepdims=True)
        recomputed = cell.test.scale * value(cell.primary, sums)[0]
    except (ValueError, IndexError):
        raise Unpaired("broken predictions") from None
    if not numpy.isclose(recomputed, cell.test.value, rtol=1e-6, atol=1e-9):
        raise Unpaired("examples and score disagree")
    return found


def value(metric: str, sums: numpy.ndarray) -> numpy.ndarray:
    """A metric of several corpora from their sums over examples, (corpora, numbers per example)."""
    combine = combined(metric)
    return combine(sums) if combine else sums[:, 0] / sums[:, 1]


def combined(metric: str) -> Callable[[numpy.ndarray], numpy.ndarray] | None:
    """How a metric is made of sums over a corpus; None: it is the mean of its examples' values."""
    return METRICS[metric].combine if metric in METRICS else None
