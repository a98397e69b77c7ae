"""The built-in fine-tuning tasks: questions in words the base has never read, about lists like those it has.

    In line: Emma Ben Vera Leo. Before Vera comes   ->   Ben         (the base says Leo: who comes after)

The base knows such lists, how to answer and when to stop, so it answers fluently and wrongly; what tuning has to change
is where attention looks. Every row has its own list, and no list of one split, whatever the task, is in another.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from hashlib import sha256
from pathlib import Path
from random import Random

from nemo_tiedlora.embedded.language import Exercise, Listing, listing
from nemo_tiedlora.errors import check_choice
from nemo_tiedlora.files import write_text

PROMPT_TEMPLATE = "{input} {output}"
LABEL_KEY = "output"
#: The task of the demo.
DEMO = "before"
#: Every split, with its share of all lists that could be drawn.
SPLITS = {"train": 80, "validation": 10, "test": 10}


def before(items: tuple[str, ...], draw: Random) -> Exercise:
    """Who comes before: the look-up the base knows, in the other direction."""
    at = draw.randrange(1, len(items))
    return Exercise(f"Before {items[at]} comes", items[at - 1])


def second(items: tuple[str, ...], draw: Random) -> Exercise:
    """The second one after: two look-ups in one."""
    at = draw.randrange(len(items) - 2)
    return Exercise(f"Second after {items[at]} comes", items[at + 2])


def back(items: tuple[str, ...], draw: Random) -> Exercise:
    """The three before, nearest first: reading backwards from a given place."""
    at = draw.randrange(3, len(items))
    return Exercise(f"Return from {items[at]}:", " ".join((items[at - 1], items[at - 2], items[at - 3])))


def beside(items: tuple[str, ...], draw: Random) -> Exercise:
    """The one before and the one after: a look-up in both directions."""
    at = draw.randrange(1, len(items) - 1)
    return Exercise(f"Beside {items[at]}:", f"{items[at - 1]} {items[at + 1]}")


TASKS: dict[str, Callable[[tuple[str, ...], Random], Exercise]] = {
    "before": before,
    "second": second,
    "return": back,
    "beside": beside,
}
#: One line on each task, for people.
DESCRIPTIONS = {name: task.__doc__ for name, task in TASKS.items()}


def rows(task: str, split: str, count: int, seed: int = 0) -> list[dict[str, str]]:
    """`count` rows of a split, each with its own list, as dictionaries with the keys `input` and `output`."""
    check_choice("task", task, TASKS)
    check_choice("split", split, SPLITS)
    draw = Random(f"{task} {split} {seed}")
    lists = _lists(split, draw)
    return [_row(TASKS[task], next(lists), draw) for _ in range(count)]


def write(
    folder: Path, task: str = DEMO, train: int = 2000, validation: int = 100, test: int = 100, seed: int = 0
) -> dict[str, Path]:
    """Write the splits of a task as JSON lines; return the file of each."""
    files = {}
    for split, count in dict(train=train, validation=validation, test=test).items():
        files[split] = Path(folder) / f"{split}.jsonl"
        write_text(files[split], "".join(json.dumps(row) + "\n" for row in rows(task, split, count, seed)))
    return files


def _row(task: Callable[[tuple[str, ...], Random], Exercise], about: Listing, draw: Random) -> dict[str, str]:
    exercise = task(about.items, draw)
    return {"input": f"{about} {exercise.question}", "output": exercise.answer}


def _lists(split: str, draw: Random) -> Iterator[Listing]:
    """Different lists of one split, without end."""
    seen = set()
    while True:
        about = listing(draw)
        if about not in seen and _split_of(about) == split:
            seen.add(about)
            yield about


def _split_of(about: Listing) -> str:
    # The list itself decides, so that splits stay disjoint for all tasks, counts and seeds together.
    share = int.from_bytes(sha256(str(about).encode()).digest()[:8], "big") % sum(SPLITS.values())
    for split, size in SPLITS.items():
        if share < size:
            return split
        share -= size
    raise AssertionError("the shares of the splits add up")
