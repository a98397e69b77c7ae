"""One way to tell a user what is wrong with their input."""

from collections.abc import Iterable
from difflib import get_close_matches


class UsageError(ValueError):
    """Bad input, said in one line: the field, its value and the way out. Scripts print it and exit with code 2."""

    def __init__(self, field: str, value: object, way_out: str):
        super().__init__(" ".join(f"{field}={value!r}: {way_out}".split()))
        self.field, self.value, self.way_out = field, value, way_out

    def __reduce__(self):  # ranks send each other their errors
        return UsageError, (self.field, self.value, self.way_out)

    def under(self, section: str) -> "UsageError":
        """The same error with the field's full name: ``rank`` becomes ``model.peft.tied_lora_tuning.rank``."""
        return UsageError(f"{section}.{self.field}", self.value, self.way_out)


class RunError(RuntimeError):
    """A run that cannot go on, said in one line. Scripts print it and exit with code 1."""


def closest(value: object, choices: Iterable[object]) -> str:
    """``did you mean 'x'? Valid: a, b, x`` — the way out of a mistyped name."""
    names = [str(choice) for choice in choices]
    lowered = {name.lower(): name for name in names}
    near = get_close_matches(str(value).lower(), lowered, n=1, cutoff=0.5)
    hint = f"did you mean {lowered[near[0]]!r}? " if near else ""
    return f"{hint}Valid: {', '.join(names)}"


def first_line(error: BaseException) -> str:
    """What an error of a library says first, or its kind where it says nothing."""
    return str(error).strip().partition("\n")[0] or type(error).__name__


def check_choice(field: str, value: object, choices: Iterable[object]) -> None:
    """Raise ``UsageError`` unless ``value`` is one of ``choices``."""
    choices = list(choices)
    if value not in choices:
        raise UsageError(field, value, closest(value, choices))
