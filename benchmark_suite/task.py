"""A task in use: examples of each split, and scores of predictions."""

import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from benchmark_suite import sources
from benchmark_suite.example import Example
from benchmark_suite.metrics import METRICS, Score
from benchmark_suite.task_spec import DELIMITER, SPLITS, TaskSpec
from benchmark_suite.templates import evaluate, mentions, render
from nemo_tiedlora.facade import UsageError, check_choice

#: What a model answers: a text, or the log-likelihood of each choice.
Prediction = str | Sequence[float]


class Task:
    """A task with its data.

    A split is opened when it is first asked for, and the test split only then: training and choosing learning rates
    cannot touch it by accident.

    Attributes:
        spec: what the task is.
        accesses: (split, where its rows were) of every split opened so far.
    """

    def __init__(self, spec: TaskSpec, data_root: str | Path | None = None, limit: int | None = None):
        if limit is not None and (type(limit) is not int or limit < 1):
            raise UsageError("limit", limit, "must be a whole number > 0")
        if data_root is not None and not Path(data_root).is_dir():
            raise UsageError("data_root", str(data_root), "no such folder")
        self.spec, self.limit = spec, limit
        self.data_root = None if data_root is None else Path(data_root)
        self.accesses: list[tuple[str, str]] = []
        self._examples: dict[str, list[Example]] = {}

    def examples(self, split: str = "validation") -> list[Example]:
        """All examples of a split, at most ``limit``.

        Raises:
            UsageError: no such split, or its data cannot be read or do not fit the spec.
        """
        check_choice("split", split, self.spec.source.splits)
        if split not in self._examples:
            where = sources.location(self.spec, split, self.data_root)
            self.accesses.append((split, where))
            found = sources.rows(self.spec, split, self.data_root, self.limit)
            self._examples[split] = [self._example(row, split, number) for number, row in enumerate(found)]
        return self._examples[split]

    @property
    def tests(self) -> list[str]:
        """The splits to test on, ``test`` first. A data root need not have the others."""
        further = [split for split in self.spec.source.splits if split not in SPLITS]
        return ["test", *(split for split in further if sources.has(self.spec, split, self.data_root))]

    def check(self) -> None:
        """Read all that training needs, so that bad data are found before it starts.

        Raises:
            UsageError: as for ``examples``, and where a test split has no file; its rows stay unread.
        """
        for split in self.spec.source.splits:
            if split in ("train", "validation"):
                self.examples(split)
        for split in self.tests:
            sources.location(self.spec, split, self.data_root)

    def score(self, predictions: Sequence[Prediction], split: str = "validation") -> dict[str, Score]:
        """Every metric of the task, the primary one first.

        Args:
            predictions: one for each example of the split, in its order.

        Raises:
            UsageError: too few or too many, or not of the task's kind.
        """
        return self.score_of(predictions, self.examples(split))

    def score_of(self, predictions: Sequence[Prediction], examples: Sequence[Example]) -> dict[str, Score]:
        """As ``score``, of any of the task's examples."""
        if len(predictions) != len(examples):
            raise UsageError("predictions", len(predictions), f"the split has {len(examples)} examples")
        for pair in zip(predictions, examples, strict=True):
            self._check(*pair)
        return {name: METRICS[name].compute(predictions, examples) for name in self.spec.metrics}

    def reward(self, prediction: Prediction, example: Example) -> float:
        """The primary metric on one example, or for a metric that needs a whole corpus what comes closest to it.

        Raises:
            UsageError: the prediction is not of the task's kind.
        """
        metric = METRICS[self.spec.primary]
        self._check(prediction, example)
        return metric.reward(prediction, example) if metric.reward else metric.compute([prediction], [example]).value

    def _check(self, prediction: Prediction, example: Example) -> None:
        if self.spec.prediction.kind == "generate":
            if not isinstance(prediction, str):
                raise UsageError("prediction", prediction, f"must be a text, for example {example.id!r}")
        elif isinstance(prediction, str) or len(prediction) != len(example.choices):
            count = len(example.choices)
            raise UsageError("prediction", prediction, f"must be {count} log-likelihoods, for example {example.id!r}")
        elif any(value != value for value in prediction):
            raise UsageError("prediction", prediction, f"a log-likelihood is not a number, for example {example.id!r}")

    def _example(self, row: sources.Row, split: str, number: int) -> Example:
        identity = str(row.get("id", f"{split}/{number}"))
        try:
            return self._built(row, identity)
        except UsageError as error:
            raise error.under(f"{self.spec.id}.{split}[{number}]") from None

    def _built(self, row: sources.Row, identity: str) -> Example:
        spec = self.spec
        row = dict(row)
        for name, expression in spec.fields.items():
            row[name] = evaluate(f"fields.{name}", expression, row)
        choices, label = self._choices(row)
        by_choice = bool(choices) and mentions(spec.prompt, "choice")  # without choices, it is a field of the row
        right = label or 0
        views = [row | {"choice": choice} for choice in choices] if by_choice else [row]
        prompts = [render("prompt", spec.prompt, view) for view in views]
        target = choices[right] if spec.target is None else render("target", spec.target, row)
        if not target.strip():
            raise UsageError("target", target, "is empty")
        queries: tuple[tuple[str, str], ...] = ()
        if spec.prediction.kind == "rank":
            pairs = ((prompt, target) for prompt in prompts) if by_choice else ((prompts[0], each) for each in choices)
            queries = tuple((prompt, DELIMITER + continuation) for prompt, continuation in pairs)
        prompt = prompts[right] if by_choice else prompts[0]
        texts, number = self._read_by_head(row)
        references = self._references(row, target)
        return Example(identity, prompt, target, references, choices, label, queries, texts, number)

    def _read_by_head(self, row: sources.Row) -> tuple[tuple[str, ...], float | None]:
        head = self.spec.head
        if head is None:
            return (), None
        texts = tuple(render("head.texts", template, row) for template in head.texts)
        if head.number is None:
            return texts, None
        number = evaluate("head.number", head.number, row)
        if type(number) not in (int, float) or not math.isfinite(number):
            raise UsageError("head.number", number, "must be a finite number")
        return texts, float(number)

    def _choices(self, row: sources.Row) -> tuple[tuple[str, ...], int | None]:
        prediction = self.spec.prediction
        if prediction.choices is None or prediction.label is None:  # they belong together
            return (), None
        given = prediction.choices
        choices = evaluate("choices", given, row) if isinstance(given, str) else given
        if not isinstance(choices, list | tuple) or not choices or not all(map(_is_text, choices)):
            raise UsageError("choices", choices, "must be a list of texts that are not empty")
        label = evaluate("label", prediction.label, row)
        if type(label) is not int or not 0 <= label < len(choices):
            raise UsageError("label", label, f"must be a whole number from 0 to {len(choices) - 1}, a choice's number")
        return tuple(choices), label

    def _references(self, row: sources.Row, target: str) -> tuple[str, ...]:
        if self.spec.references is None:
            return (target,)
        given = evaluate("references", self.spec.references, row)
        references = tuple(map(str, given if isinstance(given, list | tuple) else [given]))
        if not references:
            raise UsageError("references", given, "there must be at least one")
        return references


def _is_text(given: Any) -> bool:
    return isinstance(given, str) and bool(given)
