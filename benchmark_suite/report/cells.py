"""The cells of a benchmark: one trained and evaluated adapter each, as the runner left it in a results folder."""

import json
import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from nemo_tiedlora.facade import UsageError

NUMBER = (int, float)
TEXT = (str,)
#: What a result must hold, and of which type.
REQUIRED = {"cell": TEXT, "task": TEXT, "variant": TEXT, "seed": (int,), "status": TEXT}
STATES = ("trained", "done", "failed")
#: What it may hold; null is as good as absent.
OPTIONAL = {
    "rank": (int,),
    "lr": NUMBER,
    "primary": TEXT,
    "metrics": (dict,),
    "validation": (dict,),
    "selected": (bool,),
    "trainable": NUMBER,
    "stored": NUMBER,
    "percent_of_lora": NUMBER,
    "adapter_bytes": NUMBER,
    "peak_memory_bytes": NUMBER,
    "tokens_per_second": NUMBER,
    "seconds": NUMBER,
    "steps": NUMBER,
    "versions": (dict,),
    "data_sha256": TEXT,
    "base": TEXT,
    "base_sha256": TEXT,
    "precision": TEXT,
    "host": TEXT,
    "head": (bool,),
    "error": TEXT,
}


@dataclass(frozen=True)
class Metric:
    """A score over ``count`` examples, as it is printed: ``scale`` times what was recorded."""

    value: float
    count: int
    higher_is_better: bool
    scale: float


@dataclass(frozen=True)
class Cell:
    """One run: a task, a variant, a rank (None where a variant has none), a seed and a learning rate."""

    folder: Path
    cell: str
    task: str
    variant: str
    seed: int
    status: str
    rank: int | None = None
    lr: float | None = None
    primary: str = ""
    metrics: Mapping[str, Metric] = field(default_factory=dict)
    validation: Mapping[str, Metric] = field(default_factory=dict)
    selected: bool = True
    trainable: float | None = None
    stored: float | None = None
    percent_of_lora: float | None = None
    adapter_bytes: float | None = None
    peak_memory_bytes: float | None = None
    tokens_per_second: float | None = None
    seconds: float | None = None
    steps: float | None = None
    versions: Mapping[str, object] = field(default_factory=dict)
    data_sha256: str | None = None
    base: str | None = None
    base_sha256: str | None = None
    precision: str | None = None
    host: str | None = None
    head: bool = False
    error: str | None = None

    @property
    def failed(self) -> bool:
        return self.status == "failed"

    @property
    def test(self) -> Metric:
        """Its primary metric on the test examples; only a cell that was evaluated on them has it."""
        return self.metrics[self.primary]


@dataclass(frozen=True)
class Broken:
    """A file that is no result, and why."""

    path: str
    reason: str


@dataclass(frozen=True)
class Results:
    """What a results folder holds."""

    cells: list[Cell]
    broken: list[Broken]


def load(results: Path) -> Results:
    """Read every ``result.json`` below ``results``; a broken one is listed, not fatal.

    Raises:
        UsageError: there is no such folder, or no result in it.
    """
    if not results.is_dir():
        raise UsageError("results", str(results), "no such folder")
    cells, broken = [], []
    for path in sorted(results.rglob("result.json")):
        try:
            cells.append(_cell(path))
        except (ValueError, OSError) as error:
            broken.append(Broken(str(path.relative_to(results)), " ".join(str(error).split())))
    if not cells and not broken:
        raise UsageError("results", str(results), "no result.json below it; run the benchmark first")
    return Results(cells, broken)


def _cell(path: Path) -> Cell:
    raw = json.loads(path.read_text(encoding="utf-8"))
    if not isinstance(raw, dict):
        raise ValueError("not an object")
    missing = [name for name in REQUIRED if raw.get(name) is None]
    if missing:
        raise ValueError(f"missing: {', '.join(missing)}")
    known: dict[str, Any] = {name: _checked(name, raw[name], types) for name, types in REQUIRED.items()}
    for name, types in OPTIONAL.items():
        if raw.get(name) is not None:
            known[name] = _checked(name, raw[name], types)
    if known["status"] not in STATES:
        raise ValueError(f"status={known['status']!r}: none of {', '.join(STATES)}")
    for name in ("metrics", "validation"):
        known[name] = {key: _metric(f"{name}.{key}", value) for key, value in known.get(name, {}).items()}
    cell = Cell(folder=path.parent, **known)
    if cell.metrics and cell.primary not in cell.metrics:
        raise ValueError(f"primary={cell.primary!r}: not among its metrics ({', '.join(cell.metrics)})")
    if cell.metrics and not cell.trainable:
        raise ValueError(f"trainable={cell.trainable!r}: must be at least 1")
    return cell


def _metric(name: str, raw: object) -> Metric:
    if not isinstance(raw, dict):
        raise ValueError(f"{name}: not an object")
    scale = _checked(f"{name}.scale", raw.get("scale", 1.0), NUMBER)
    return Metric(
        scale * _checked(f"{name}.value", raw.get("value"), NUMBER),
        _checked(f"{name}.count", raw.get("count"), (int,)),
        _checked(f"{name}.higher_is_better", raw.get("higher_is_better"), (bool,)),
        scale,
    )


def _checked(name: str, value: object, types: tuple[type, ...]) -> Any:
    # bool is an int to Python, not to a reader of results
    if not isinstance(value, types) or (isinstance(value, bool) and bool not in types):
        raise ValueError(f"{name}={value!r}: not a {' or '.join(kind.__name__ for kind in types)}")
    if isinstance(value, float) and not math.isfinite(value):
        raise ValueError(f"{name}={value!r}: not a finite number")
    return value
