"""What the suite asks of a host: to train on a base, and to try what was trained."""

from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol

from benchmark_suite.example import Example
from benchmark_suite.task_spec import Recipe, TaskSpec
from benchmark_suite.variant_spec import VariantSpec

if TYPE_CHECKING:
    from torch import Tensor

#: Padded tokens of a micro-batch, at most.
TOKENS = 8192
#: Called after every step with the number of steps done and to do.
Progress = Callable[[int, int], None]


@dataclass(frozen=True)
class Training:
    """What to train, and on what.

    Args:
        variant, rank: the method; rank None for variants that have none.
        train, validation: examples; a model learns ``target`` after ``prompt``, a head what it is to say of ``texts``.
        recipe: steps, batches, lengths, warm-up, validations.
        lr: learning rate.
        seed: of the adapter's and the head's start, of dropout, and of the order of examples for a head.
        files: a folder that a host may keep these examples in, in its own form; theirs alone.
        head: outputs of the head to train (1: a number); None: the model learns to write.
        score: predictions for ``validation`` → higher is better; where given, the weights that are kept are those with
            the best one, else those with the lowest loss.
    """

    variant: VariantSpec
    rank: int | None
    train: Sequence[Example]
    validation: Sequence[Example]
    recipe: Recipe
    lr: float
    seed: int
    files: Path
    head: int | None = None
    score: Callable[[Sequence[Sequence[float]]], float] | None = None

    @property
    def warmup(self) -> int:
        """Steps of warm-up, less than there are steps."""
        return min(self.recipe.warmup_steps, self.recipe.steps - 1)

    @property
    def micro_batch(self) -> int:
        """Rows that are trained on at a time: a divisor of the batch."""
        whole, longest = self.recipe.batch_size, self.recipe.max_seq_length
        fitting = [size for size in range(1, whole + 1) if whole % size == 0 and size * longest <= TOKENS]
        return max(fitting, default=1)


class Facts(Protocol):
    """What a training measured.

    Attributes:
        steps: taken. best_step: the one whose weights were kept.
        seconds: of training steps, validation excluded. tokens: token positions trained on, padding included.
        losses: (step, validation loss) of every validation.
    """

    steps: int
    best_step: int
    seconds: float
    tokens: int
    losses: list[tuple[int, float]]


class Trained(Protocol):
    """A base with what was trained on it, inside ``Backend.trained``."""

    facts: Facts

    @property
    def trainable(self) -> Mapping[str, "Tensor"]:
        """What was trained, by parameter name."""

    @property
    def sizes(self) -> dict[str, Any]:
        """For the record: ``trainable``, ``stored`` and ``percent_of_lora``; of a head, ``head_parameters`` too.

        A head's parameters are in none of the others, as in the papers' tables.
        """

    def save(self, folder: Path) -> int:
        """Write it into a folder, as the host does; how many bytes."""

    def generate(self, prompts: Sequence[str], tokens: int) -> list[str]:
        """Greedy completions, in order, of at most so many tokens."""

    def log_likelihoods(self, pairs: Sequence[tuple[str, str]]) -> list[tuple[float, bool]]:
        """For every (context, continuation): the continuation's log-likelihood, and whether greedy gives it."""

    def outputs(self, texts: Sequence[tuple[str, ...]]) -> list[list[float]]:
        """What the head says of every text, or pair of texts."""


class Backend(Protocol):
    """A host with a base.

    Attributes:
        host: its name.
        precision: ``32`` or ``bf16``.
    """

    host: str
    precision: str

    @property
    def base(self) -> str:
        """What the base is called in results."""

    @property
    def base_sha256(self) -> str:
        """SHA-256 of the base's content (hexadecimal)."""

    def __enter__(self) -> "Backend": ...

    def __exit__(self, *exception: object) -> None:
        """Let the base go."""

    def loggers(self) -> Sequence[str]:
        """Loggers that keep what they hear from the root logger; called before anything is logged."""

    def packages(self, variant: VariantSpec) -> Sequence[str]:
        """Names of those whose versions are recorded."""

    def runs(self, variant: VariantSpec) -> bool:
        """Whether the variant is one for this host at all."""

    def has_head(self, task: TaskSpec, wanted: bool | None) -> bool:
        """Whether a task is trained with a head here, and not as text.

        Args:
            wanted: by the user; None: as the base is made for.

        Raises:
            UsageError: the base cannot be trained for the task, or not as wanted.
        """

    def check(self, variant: VariantSpec, rank: int | None, head: bool) -> None:
        """Raises ``UsageError``, in a second or so, for a variant that cannot be trained on the base."""

    def load(self, training: Training) -> None:
        """Have in memory what a training needs: the time that this takes is no cell's."""

    def trained(
        self, training: Training, weights: "Mapping[str, Tensor] | None" = None, progress: Progress | None = None
    ) -> AbstractContextManager[Trained]:
        """Train, or take ``weights`` that an equal training gave; at the end the base is as it was."""
