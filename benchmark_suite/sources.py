"""Rows of a split: from a data root, a folder, the Hugging Face Hub, or a generator."""

import csv
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

from benchmark_suite.task_spec import TaskSpec
from nemo_tiedlora.facade import UsageError, first_line

Row = dict[str, Any]


def location(spec: TaskSpec, split: str, data_root: Path | None) -> str:
    """Where the rows of a split are, in words; nothing is opened.

    Raises:
        UsageError: no file for it in the folder.
    """
    source = spec.source
    if source.generated:
        return f"generated: {source.generated}"
    if data_root is not None:
        return str(_file(Path(data_root) / source.name, split, f"{spec.id}.{split}"))
    if source.folder:
        return str(_file(Path(source.folder), str(source.splits[split]), f"{spec.id}.{split}"))
    config = f", {source.config}" if source.config else ""
    return f"Hugging Face: {source.path}{config}, {source.splits[split]}"


def has(spec: TaskSpec, split: str, data_root: Path | None) -> bool:
    """Whether a split has a file, where it has to have one."""
    try:
        location(spec, split, data_root)
    except UsageError:
        return False
    return True


def rows(spec: TaskSpec, split: str, data_root: Path | None, limit: int | None) -> list[Row]:
    """The rows of a split, the first ``limit`` of them.

    Raises:
        UsageError: no such file or dataset, a file that cannot be read (with its line), or no rows.
    """
    source, where = spec.source, location(spec, split, data_root)
    if source.generated:
        from nemo_tiedlora.facade import builtin_rows

        found = builtin_rows(source.generated, split, int(source.splits[split]), spec.seed)
    elif data_root is not None or source.folder:
        found = READERS[Path(where).suffix](Path(where))
    else:
        found = _downloaded(spec, split)
    if not found:
        raise UsageError(f"{spec.id}.{split}", where, "has no rows")
    return list(found[:limit])


def _jsonl(file: Path) -> list[Row]:
    found = []
    with file.open(encoding="utf-8") as lines:
        for number, line in enumerate(lines, 1):
            if not line.strip():
                continue
            try:
                row = json.loads(line)
            except ValueError as error:
                raise UsageError("file", f"{file}:{number}", f"not JSON: {error}") from None
            if not isinstance(row, dict):
                raise UsageError("file", f"{file}:{number}", "a row must be an object with fields")
            found.append(row)
    return found


def _csv(file: Path) -> list[Row]:
    with file.open(encoding="utf-8", newline="") as lines:
        return list(csv.DictReader(lines))


def _parquet(file: Path) -> list[Row]:
    from pyarrow import ArrowException, parquet

    try:
        return parquet.read_table(file).to_pylist()
    except ArrowException as error:
        raise UsageError("file", str(file), f"not readable as Parquet: {error}") from None


#: How a file is read, by its ending.
READERS: dict[str, Callable[[Path], list[Row]]] = {".jsonl": _jsonl, ".parquet": _parquet, ".csv": _csv}


def _file(folder: Path, stem: str, field: str) -> Path:
    found = [folder / f"{stem}{ending}" for ending in READERS if (folder / f"{stem}{ending}").is_file()]
    if not found:
        raise UsageError(field, str(folder), f"no {stem}.jsonl, {stem}.parquet or {stem}.csv in this folder")
    return found[0]


def _downloaded(spec: TaskSpec, split: str) -> list[Row]:
    from datasets import load_dataset

    source = spec.source
    try:
        return load_dataset(source.path, source.config, split=source.splits[split], revision=source.revision).to_list()
    except Exception as error:  # whatever the Hub, the network or the dataset says, the way out is the same
        wanted = f"DIR/{source.name}/{split}.jsonl"
        raise UsageError(
            f"{spec.id}.{split}", source.path, f"{first_line(error)}; or give --data-root DIR with {wanted}"
        ) from None
