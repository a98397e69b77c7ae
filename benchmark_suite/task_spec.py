"""What a task is: data, prompt, how a prediction is made, metrics, and a recipe to train for it."""

import re
from dataclasses import dataclass, field, replace
from typing import Any, get_args

from benchmark_suite.declared import build, check_list, check_rates, check_text, check_whole, plain
from benchmark_suite.metrics import METRICS, Kind
from benchmark_suite.templates import check_expression, check_template
from benchmark_suite.variant_spec import VariantSpec
from nemo_tiedlora.facade import UsageError, check_choice, closest

#: The splits that every task has. More to test on may be declared, with names such as ``test_mismatched``.
SPLITS = ("train", "validation", "test")
#: What stands between a prompt and what follows it, as in lm-evaluation-harness and NeMo's ``{input} {output}``.
DELIMITER = " "
#: Metrics of what heads say: a score for each choice, or a number.
CLASSES = ("acc", "f1", "mcc")
NUMBERS = ("pearson", "spearman")
_ID = re.compile(r"[a-z0-9]+([_-][a-z0-9]+)*-v[1-9][0-9]*")


@dataclass(frozen=True, kw_only=True)
class Source:
    """Where rows come from: one of ``path``, ``folder`` and ``generated``.

    Args:
        name: folder of this dataset under a data root, which takes the place of ``path`` where one is given.
        path: dataset on the Hugging Face Hub; ``config`` and ``revision`` belong to it.
        folder: folder with one JSONL, Parquet or CSV file for each split.
        generated: one of the built-in tasks of ``nemo_tiedlora.embedded``.
        splits: split → its name in the source (Hugging Face slices such as ``train[:90%]`` too); for a folder, the
            file's name without its ending; for ``generated``, how many rows.
    """

    name: str
    path: str | None = None
    config: str | None = None
    revision: str | None = None
    folder: str | None = None
    generated: str | None = None
    splits: dict[str, str | int] = field(default_factory=lambda: {split: split for split in SPLITS})

    def __post_init__(self):
        check_text("name", self.name)
        kinds = {"path": self.path, "folder": self.folder, "generated": self.generated}
        given = [name for name, value in kinds.items() if value is not None]
        if len(given) != 1:
            raise UsageError("path", self.path, "name one source: path (Hugging Face), folder or generated")
        check_text(given[0], kinds[given[0]])
        if self.generated:
            from nemo_tiedlora.facade import BUILTIN_TASKS

            check_choice("generated", self.generated, BUILTIN_TASKS)
        if not isinstance(self.splits, dict):
            raise UsageError("splits", self.splits, "write a mapping, such as {train: train, test: validation}")
        for split in SPLITS:
            if split not in self.splits:
                raise UsageError("splits", self.splits, f"has no {split!r}")
        for split, name in self.splits.items():
            if split not in SPLITS and not split.startswith("test_"):
                raise UsageError(f"splits.{split}", name, f"a further split to test on begins with test_: test_{split}")
            check = check_whole if self.generated else check_text
            check(f"splits.{split}", name)


@dataclass(frozen=True, kw_only=True)
class Prediction:
    """How a model answers.

    ``generate``: greedy decoding until a stop string, the end of the text or ``max_tokens``. ``rank``: the choice that
    is likeliest after the prompt; metrics say whether its log-likelihood is taken raw or divided by its length.

    Args:
        kind: ``generate`` or ``rank``.
        stop: texts at which an answer ends.
        max_tokens: longest answer, in tokens.
        choices: the possible answers, as a list or as an expression over a row's fields.
        label: expression for the number of the right choice, from 0.
    """

    kind: Kind
    stop: list[str] = field(default_factory=list)
    max_tokens: int | None = None
    choices: list[str] | str | None = None
    label: str | None = None

    def __post_init__(self):
        check_choice("kind", self.kind, get_args(Kind))
        check_list("stop", self.stop, str, "texts", empty=True)
        if "" in self.stop:
            raise UsageError("stop", self.stop, "an empty text would stop every answer at once")
        if self.kind == "generate":
            check_whole("max_tokens", self.max_tokens)
        elif self.max_tokens is not None or self.stop:
            raise UsageError("kind", self.kind, "nothing is generated; leave out stop and max_tokens")
        if self.kind == "rank" and self.choices is None:
            raise UsageError("choices", None, "missing; ranking needs the choices")
        if (self.choices is None) != (self.label is None):
            raise UsageError("label", self.label, "choices and label belong together")
        if isinstance(self.choices, str):
            check_expression("choices", self.choices)
        elif self.choices is not None:
            check_list("choices", self.choices, str, "texts (in quotation marks where they look like numbers)")
        if self.label is not None:
            check_expression("label", self.label)


@dataclass(frozen=True, kw_only=True)
class Head:
    """What a head on an encoder reads and says, where a decoder writes.

    Args:
        texts: templates of the text, or of the two texts, that it reads.
        number: expression for the number that it is to say; without one it chooses among ``prediction.choices``.
    """

    texts: list[str]
    number: str | None = None

    def __post_init__(self):
        check_list("texts", self.texts, str, "one or two templates")
        if len(self.texts) > 2:
            raise UsageError("texts", self.texts, "write one or two templates; models take no more texts at a time")
        for text in self.texts:
            check_template("texts", text)
        if self.number is not None:
            check_expression("number", self.number)


@dataclass(frozen=True, kw_only=True)
class Recipe:
    """How to train for a task, unless said otherwise.

    Args:
        lr: learning rates to choose from by the validation split.
        variant_lr: variant name → its own learning rates.
        steps: most optimizer steps.
        batch_size: rows in an optimizer step.
        max_seq_length: longest prompt and answer together, in tokens.
        warmup_steps: steps in which the learning rate rises.
        val_interval: steps between validations.
        patience: validations without improvement before training stops early; null for never.
    """

    lr: list[float]
    steps: int
    batch_size: int
    max_seq_length: int
    variant_lr: dict[str, list[float]] = field(default_factory=dict)
    warmup_steps: int = 50
    val_interval: int = 30
    patience: int | None = 10

    def __post_init__(self):
        check_rates("lr", self.lr)
        if not isinstance(self.variant_lr, dict):
            raise UsageError("variant_lr", self.variant_lr, "write a mapping, such as {TL6: [3e-2]}")
        for name, rates in self.variant_lr.items():
            check_rates(f"variant_lr.{name}", rates)
        for name in ("steps", "batch_size", "max_seq_length", "val_interval"):
            check_whole(name, getattr(self, name))
        check_whole("warmup_steps", self.warmup_steps, least=0)
        if self.patience is not None:
            check_whole("patience", self.patience)

    def rates(self, variant: VariantSpec) -> list[float]:
        """The learning rates to choose from: the task's for this variant, else the variant's, else the task's."""
        return self.variant_lr.get(variant.name) or variant.lr or self.lr


@dataclass(frozen=True, kw_only=True)
class TaskSpec:
    """A task, complete: two runs of one version mean the same thing.

    Args:
        id: name and version, such as ``gsm8k-v1``. What changes scores gets a new version.
        description: one line, for people.
        source: where rows come from.
        prompt: template of what the model reads. If it uses ``choice``, there is one prompt for each choice.
        target: template of the answer to train on; by default the right choice. A ranked task whose prompt uses
            ``choice`` compares the likelihoods of this text after each prompt.
        references: expression for the answers that count as right (one text or a list); by default the target.
        fields: name → expression; added to each row before the templates see it, in this order.
        prediction: how the model answers.
        metrics: names from ``benchmark_suite.metrics``; the first one is the primary one.
        recipe: how to train for it.
        head: what a head on an encoder reads and says; None: the task is for models that write.
        seed: of everything that is drawn.
        citation: where the task comes from.
        groups: names under which several tasks run together.

    Raises:
        UsageError: for the first thing that is wrong.
    """

    id: str
    description: str
    source: Source
    prompt: str
    prediction: Prediction
    metrics: list[str]
    recipe: Recipe
    head: Head | None = None
    target: str | None = None
    references: str | None = None
    fields: dict[str, str] = field(default_factory=dict)
    seed: int = 1234
    citation: str = ""
    groups: list[str] = field(default_factory=list)

    def __post_init__(self):
        if not isinstance(self.id, str) or not _ID.fullmatch(self.id):
            raise UsageError("id", self.id, "write a name and a version, such as my-task-v1")
        check_text("description", self.description)
        check_text("prompt", self.prompt)
        check_template("prompt", self.prompt)
        if self.target is not None:
            check_template("target", self.target)
        elif self.prediction.choices is None:
            raise UsageError("target", None, "missing; without choices there is no other answer to train on")
        if self.references is not None:
            check_expression("references", self.references)
        if not isinstance(self.fields, dict):
            raise UsageError("fields", self.fields, "write a mapping of names to expressions")
        for name, expression in self.fields.items():
            check_expression(f"fields.{name}", expression)
        self._check_metrics()
        self._check_head()
        check_whole("seed", self.seed, least=0)
        if not isinstance(self.citation, str):
            raise UsageError("citation", self.citation, "must be a text")
        check_list("groups", self.groups, str, "names", empty=True)

    def _check_metrics(self) -> None:
        check_list("metrics", self.metrics, str, f"some of {', '.join(METRICS)}")
        for name in self.metrics:
            if name not in METRICS:
                raise UsageError("metrics", name, f"unknown metric; {closest(name, METRICS)}")
            metric = METRICS[name]
            if metric.prediction != self.prediction.kind:
                fitting = [name for name, metric in METRICS.items() if metric.prediction == self.prediction.kind]
                kind = self.prediction.kind
                raise UsageError("metrics", name, f"not for prediction.kind {kind!r}; those are {', '.join(fitting)}")
            if metric.choices and self.prediction.choices is None:
                raise UsageError("metrics", name, "needs prediction.choices and prediction.label")

    def _check_head(self) -> None:
        if self.head is None:
            return
        if self.head.number is None and not isinstance(self.prediction.choices, list):
            way_out = "a head needs number, or prediction.choices as a list, the same for all rows"
            raise UsageError("head", self.head.texts, way_out)
        kind, fitting = ("number", NUMBERS) if self.head.number else ("choice", CLASSES)
        for name in self.metrics:
            if name not in fitting:
                raise UsageError("metrics", name, f"not for a head that says a {kind}; those are {', '.join(fitting)}")

    @property
    def head_outputs(self) -> int | None:
        """How many numbers a head says: one for each choice, or the one; None: the task has no head."""
        if self.head is None:
            return None
        return 1 if self.head.number else len(self.prediction.choices or ())

    @property
    def primary(self) -> str:
        """The metric by which methods are compared and learning rates chosen."""
        return self.metrics[0]

    @classmethod
    def from_dict(cls, given: dict[str, Any]) -> "TaskSpec":
        """A spec from plain data, such as a YAML file.

        Raises:
            UsageError: for the first thing that is wrong, under the task's id.
        """
        identity = given.get("id") if isinstance(given, dict) else None
        try:
            parts = {"source": Source, "prediction": Prediction, "recipe": Recipe, "head": Head}
            built: dict[str, Any] = {
                name: build(kind, given[name], name) for name, kind in parts.items() if name in given
            }
            return build(cls, given | built)
        except UsageError as error:
            raise (error.under(identity) if isinstance(identity, str) and error.field != "id" else error) from None

    def to_dict(self) -> dict[str, Any]:
        """The spec as plain data, for JSON and YAML; ``from_dict`` takes it back. Defaults are left out."""
        return plain(self)

    def at(self, folder: str) -> "TaskSpec":
        """The same spec with its source's relative folder under ``folder``."""
        from pathlib import Path

        if self.source.folder is None:
            return self
        return replace(self, source=replace(self.source, folder=str(Path(folder) / self.source.folder)))
