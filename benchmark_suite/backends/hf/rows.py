"""Rows as a model reads them, and the order in which it does; for text, those of NeMo's workbench."""

import math
from collections.abc import Iterator, Sequence
from typing import Any, NamedTuple

import numpy

from benchmark_suite.example import Example
from benchmark_suite.task_spec import DELIMITER


class Row(NamedTuple):
    """A text in tokens. What is learned is every token from ``start`` on."""

    ids: list[int]
    start: int


def rows(examples: Sequence[Example], tokenizer: Any, longest: int) -> list[Row]:
    """Prompts and answers with the end of text; what is too long loses its beginning, the prompt's first."""
    delimiter = DELIMITER if is_space_sensitive(tokenizer) else ""
    prompts = ids_of(tokenizer, [example.prompt.strip(" ") for example in examples])
    answers = ids_of(tokenizer, [delimiter + example.target.strip(" ") for example in examples])
    found = []
    for prompt, answer in zip(prompts, answers, strict=True):
        answer = [*answer, tokenizer.eos_token_id][-longest:]
        prompt = prompt[max(0, len(prompt) + len(answer) - longest) :]
        found.append(Row(prompt + answer, len(prompt)))
    return found


def ids_of(tokenizer: Any, texts: Sequence[str]) -> list[list[int]]:
    """Tokens of texts, without any that stand for a beginning or an end."""
    return tokenizer(list(texts), add_special_tokens=False).input_ids if texts else []


def is_space_sensitive(tokenizer: Any) -> bool:
    """Whether a space before a word is part of its token, and not implied."""
    return tokenizer.tokenize("x y") != tokenizer.tokenize("x") + tokenizer.tokenize("y")


def nemo_batches(count: int, size: int, steps: int) -> Iterator[list[int]]:
    """Numbers of the rows of each step, in the order that NeMo's workbench has in every run.

    Args:
        count: of rows. size: of a batch.
    """
    epochs = math.ceil(math.ceil(steps * size * 1.005) / count)  # NeMo's margin for blending files
    order: list[int] = []
    for epoch in range(epochs):
        order += numpy.random.RandomState(1 + epoch).permutation(count).tolist()
    for step in range(steps):
        yield order[step * size : (step + 1) * size]


def shuffled_batches(count: int, size: int, steps: int, seed: int) -> Iterator[list[int]]:
    """Numbers of the rows of each step: every row once before any is read again, in an order of its own."""
    draw = numpy.random.default_rng(seed)
    order: list[int] = []
    for _ in range(steps):
        while len(order) < size:
            order += draw.permutation(count).tolist()
        batch, order = order[:size], order[size:]
        yield batch


def filled_batches(count: int, size: int) -> Iterator[list[int]]:
    """Numbers of all rows in order; the last batch is filled with the last row, as NeMo does for validation."""
    for start in range(0, count, size):
        yield [min(number, count - 1) for number in range(start, start + size)]


def groups(lengths: Sequence[int], fits: Any) -> Iterator[list[int]]:
    """Numbers of things, shortest first, in groups.

    Args:
        fits: whether so many things, the longest so long, are one group; a single thing always is.
    """
    group: list[int] = []
    for number in sorted(range(len(lengths)), key=lengths.__getitem__):
        if group and not fits(len(group) + 1, lengths[number]):
            yield group
            group = []
        group.append(number)
    if group:
        yield group
