"""One cell of a sweep: a task, a variant, a rank, a seed and a learning rate, on one base."""

import hashlib
import json
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

from benchmark_suite.task_spec import TaskSpec
from benchmark_suite.variant_spec import VariantSpec
from nemo_tiedlora.facade import __version__


@dataclass(frozen=True)
class Cell:
    """Everything that determines a result.

    Args:
        task, variant: what is trained, on what.
        rank: None for variants that have none.
        seed, lr: of the run.
        base_sha256: of the base's file.
        data_sha256: of the training and validation examples. The test split is not among them: it is not read until a
            cell has won.
        precision: ``32`` or ``bf16``.
        limit: at most this many examples of each split; None: all.
        host: name of the backend that it is trained by.
        head: whether a head is trained, and not text.
    """

    task: TaskSpec
    variant: VariantSpec
    rank: int | None
    seed: int
    lr: float
    base_sha256: str
    data_sha256: str
    precision: str = "32"
    limit: int | None = None
    host: str = "nemo"
    head: bool = False

    @property
    def hash(self) -> str:
        """Twelve hexadecimal digits that differ if anything does."""
        known = asdict(self) | {"version": __version__}
        for name in ("description", "citation", "groups"):  # for people
            known["task"].pop(name, None)
            known["variant"].pop(name, None)
        for name in ("lr", "variant_lr"):
            known["task"]["recipe"].pop(name, None)  # the candidates; the one in use is in the cell
        if not self.head:
            known["task"].pop("head")
        known["variant"].pop("lr", None)
        known["variant"].pop("ranks", None)
        text = json.dumps(known, sort_keys=True, ensure_ascii=False)
        return hashlib.sha256(text.encode()).hexdigest()[:12]

    @property
    def contest(self) -> "Cell":
        """What cells that differ in the learning rate only have in common."""
        return replace(self, lr=0.0)

    @property
    def name(self) -> str:
        """For people, and for the folder: ``r8-s0-lr0.01``."""
        rank = "" if self.rank is None else f"r{self.rank}-"
        return f"{rank}s{self.seed}-lr{self.lr:g}"

    def folder(self, results: Path) -> Path:
        """Where its results are."""
        return results / self.task.id / self.variant.name.replace("*", "-star") / f"{self.name}-{self.hash}"


def read(path: Path) -> dict[str, Any] | None:
    """A JSON file; None if there is none, or not a whole one."""
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except (FileNotFoundError, ValueError):
        return None


def sha256_of_examples(task, head: bool = False) -> str:
    """SHA-256 of what a task trains and validates on (hexadecimal), with what a head reads if there is one."""
    digest = hashlib.sha256()
    for split in ("train", "validation"):
        for example in task.examples(split):
            row = asdict(example)
            if not head:
                del row["texts"], row["number"]
            digest.update(json.dumps(row, ensure_ascii=False).encode())
    return digest.hexdigest()
