"""Texts that a base is calibrated on."""

import json
from collections.abc import Iterator
from pathlib import Path
from random import Random

from nemo_tiedlora.errors import UsageError, closest


def read_texts(path: str | Path, samples: int, field: str = "text", seed: int = 1234) -> list[str]:
    """``samples`` texts, drawn from all and in their order; all of them if there are no more.

    Args:
        path: JSONL, whose ``field`` is the text; or plain text, one per non-empty line.
        seed: of the draw.

    Raises:
        UsageError: no such file, nothing in it, or a row without the field.
    """
    drawn: dict[int, str] = {}
    random = Random(seed)
    for number, text in enumerate(_texts(Path(path), field)):
        if number >= samples:  # reservoir sampling: every text so far stays with the same probability
            place = random.randrange(number + 1)
            if place >= samples:
                continue
            del drawn[list(drawn)[place]]
        drawn[number] = text
    if not drawn:
        raise UsageError("data", str(path), "there is no text in it")
    return list(drawn.values())


def _texts(path: Path, field: str) -> Iterator[str]:
    if not path.is_file():
        raise UsageError("data", str(path), "no such file")
    with path.open(encoding="utf-8-sig", errors="replace") as file:
        for number, line in enumerate(file, 1):
            if path.suffix in (".jsonl", ".json"):
                try:
                    row = json.loads(line)
                except (ValueError, RecursionError) as error:
                    raise UsageError("data", str(path), f"line {number} is not JSON ({error})") from None
                if not isinstance(row, dict) or not isinstance(row.get(field), str):
                    way_out = closest(field, row) if isinstance(row, dict) else "it is not a JSON object"
                    raise UsageError("field", field, f"line {number} of {path} has no such text; {way_out}")
                line = row[field]
            if line.strip():
                yield line.strip()
