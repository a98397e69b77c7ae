"""A row of a task as models see it."""

from dataclasses import dataclass


@dataclass(frozen=True)
class Example:
    """One question.

    Args:
        id: of the row, or the split and the row's number.
        prompt: what the model reads; in a task with a prompt for each choice, that of the right one.
        target: the answer to train on, without the delimiter before it.
        references: answers that count as right.
        choices: possible answers.
        label: number of the right choice.
        queries: for ranking, the pairs (prompt, continuation) whose log-likelihoods are a prediction, one pair for
            each choice; a continuation starts with the delimiter.
        texts, number: what a head reads, and the number that it is to say; see ``task_spec.Head``.
    """

    id: str
    prompt: str
    target: str
    references: tuple[str, ...]
    choices: tuple[str, ...] = ()
    label: int | None = None
    queries: tuple[tuple[str, str], ...] = ()
    texts: tuple[str, ...] = ()
    number: float | None = None

    @property
    def right(self) -> int:
        """The number of the right choice. Raises ``ValueError`` where there is nothing to choose from."""
        if self.label is None:
            raise ValueError(f"example {self.id} has no choices")
        return self.label
