"""What is learned: to write answers, or to say of texts what a head is to say."""

from collections.abc import Iterator, Sequence
from inspect import signature
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from benchmark_suite.backends.hf.rows import (
    Row,
    filled_batches,
    groups,
    nemo_batches,
    rows,
    shuffled_batches,
)
from benchmark_suite.backends.protocol import TOKENS, Training
from benchmark_suite.example import Example

#: Positions whose scores of the whole vocabulary are in memory at a time, unless one text has more.
POSITIONS = 1024


class Writing:
    """The answers' tokens are learned, to the numbers of NeMo's workbench on the same base.

    A loss is the mean over the micro-batches of a batch, each a mean over the tokens learned in it.
    """

    def __init__(self, model: Any, tokenizer: Any, training: Training, longest: int):
        longest = min(longest, training.recipe.max_seq_length)
        self.model, self.training = model, training
        self.train = rows(training.train, tokenizer, longest)
        self.validation = rows(training.validation, tokenizer, longest)

    def batches(self) -> Iterator[list[int]]:
        """Numbers of the rows of every step."""
        recipe = self.training.recipe
        return nemo_batches(len(self.train), recipe.batch_size, recipe.steps)

    def losses(self, batch: Sequence[int]) -> Iterator[tuple[Tensor, int]]:
        """Parts of the loss of a batch, each with the number of token positions it took; their sum is the loss."""
        yield from self._losses([self.train[number] for number in batch])

    @torch.no_grad()
    def validate(self) -> tuple[float, None]:
        """The loss over the validation rows: the mean over their batches."""
        size = self.training.recipe.batch_size
        found = [
            sum(float(part) for part, _ in self._losses([self.validation[number] for number in batch]))
            for batch in filled_batches(len(self.validation), size)
        ]
        return sum(found) / len(found), None

    def _losses(self, batch: list[Row]) -> Iterator[tuple[Tensor, int]]:
        micro = self.training.micro_batch
        for start in range(0, len(batch), micro):
            rows = batch[start : start + micro]
            learned = sum(_learned(row) for row in rows)
            for piece in _pieces(rows):
                scores, answers, _ = answer_scores(self.model, piece)
                loss = F.cross_entropy(scores, answers, reduction="sum")
                yield loss / learned * micro / len(batch), len(piece) * max(len(row.ids) for row in piece)


class Saying:
    """What a head is to say is learned: the right choice (cross-entropy), or a number (squared error)."""

    def __init__(self, model: Any, tokenizer: Any, training: Training, longest: int):
        self.model, self.tokenizer, self.training = model, tokenizer, training
        self.longest = min(longest, training.recipe.max_seq_length)

    def batches(self) -> Iterator[list[int]]:
        recipe = self.training.recipe
        return shuffled_batches(len(self.training.train), recipe.batch_size, recipe.steps, self.training.seed)

    def losses(self, batch: Sequence[int]) -> Iterator[tuple[Tensor, int]]:
        micro = self.training.micro_batch
        for start in range(0, len(batch), micro):
            examples = [self.training.train[number] for number in batch[start : start + micro]]
            inputs = encoded(self.model, self.tokenizer, [example.texts for example in examples], self.longest)
            said = self.model(**inputs).logits.float()
            yield _error(said, examples) / len(batch), inputs["input_ids"].numel()

    @torch.no_grad()
    def validate(self) -> tuple[float, list[list[float]]]:
        """The mean loss over the validation examples, and what the head says of each."""
        examples = self.training.validation
        said = outputs(self.model, self.tokenizer, [example.texts for example in examples], self.longest)
        loss = _error(torch.tensor(said), examples) / len(examples)
        return float(loss), said


def answer_scores(model: Any, rows: Sequence[Row]) -> tuple[Tensor, Tensor, list[int]]:
    """Scores of the vocabulary where a token is to be said, and at no other position.

    Returns:
        Scores (positions, vocabulary) in float32, the tokens to say (positions), and how many positions each row has.
    """
    device, longest = model.device, max(len(row.ids) for row in rows)
    ids = torch.zeros(len(rows), longest, dtype=torch.long)
    mask = torch.zeros_like(ids)
    for line, row in enumerate(rows):
        ids[line, : len(row.ids)], mask[line, : len(row.ids)] = torch.tensor(row.ids), 1
    counts = [_learned(row) for row in rows]
    lines = torch.repeat_interleave(torch.arange(len(rows)), torch.tensor(counts))
    places = torch.cat([torch.arange(len(row.ids) - 1 - many, len(row.ids) - 1)
                        for row, many in zip(rows, counts, strict=True)])  # fmt: skip

    def only_those(module, args):
        return (args[0][lines.to(args[0].device), places.to(args[0].device)],)

    hook = model.get_output_embeddings().register_forward_pre_hook(only_those)
    try:
        scores = model(input_ids=ids.to(device), attention_mask=mask.to(device), use_cache=False).logits
    finally:
        hook.remove()
    return scores.float(), ids[lines, places + 1].to(scores.device), counts


@torch.no_grad()
def outputs(model: Any, tokenizer: Any, texts: Sequence[tuple[str, ...]], longest: int) -> list[list[float]]:
    """What the head says of every text or pair of texts, cut to so many tokens; none depends on the others."""
    lengths = [sum(map(len, each)) for each in texts]  # letters will do to put like to like
    said: dict[int, list[float]] = {}
    for group in groups(lengths, lambda count, _: count * longest <= TOKENS):
        inputs = encoded(model, tokenizer, [texts[number] for number in group], longest)
        said |= dict(zip(group, model(**inputs).logits.float().tolist(), strict=True))
    return [said[number] for number in range(len(texts))]


def encoded(model: Any, tokenizer: Any, texts: Sequence[tuple[str, ...]], longest: int) -> dict[str, Tensor]:
    """Texts or pairs of texts with what the model's own training put around them, as far as the model takes it."""
    parts = [list(part) for part in zip(*texts, strict=True)]
    found = tokenizer(*parts, truncation=True, max_length=longest, padding=True, return_tensors="pt")
    taken = signature(model.forward).parameters
    return {name: tensor.to(model.device) for name, tensor in found.items() if name in taken}


def _error(said: Tensor, examples: Sequence[Example]) -> Tensor:
    """Summed over examples."""
    if examples[0].number is None:
        right = torch.tensor([each.right for each in examples], device=said.device)
        return F.cross_entropy(said, right, reduction="sum")
    numbers = torch.tensor([each.number for each in examples], dtype=said.dtype, device=said.device)
    return F.mse_loss(said[:, 0], numbers, reduction="sum")


def _learned(row: Row) -> int:
    """How many of its tokens are: a first one has nothing before it."""
    return len(row.ids) - max(1, row.start)


def _pieces(rows: Sequence[Row]) -> Iterator[list[Row]]:
    piece: list[Row] = []
    for row in rows:
        if piece and sum(map(_learned, piece)) + _learned(row) > POSITIONS:
            yield piece
            piece = []
        piece.append(row)
    yield piece
