"""What is recorded of a frozen tensor, so that the one drawn again can be told from any other."""

import hashlib
import math
import re

import numpy
from torch import Tensor

from nemo_tiedlora.errors import UsageError
from nemo_tiedlora.variants import drawing_by_torch

#: A record: a SHA-256 and, unless an earlier version made it, a fingerprint.
RECORD = re.compile(r"[0-9a-f]{64}( -?\d{1,20}\.\d{5}){4}|[0-9a-f]{64}", re.ASCII)
#: Tensors whose fingerprints differ by no more are the same but for rounding; in units of the tensor per element.
TOLERANCE = 1e-5


def checksum(tensor: Tensor) -> str:
    """SHA-256 of a tensor's float32 values in row-major order, little-endian (hexadecimal)."""
    return hashlib.sha256(_values(tensor).astype("<f4").tobytes()).hexdigest()


def fingerprint(tensor: Tensor, unit: float) -> list[float]:
    """The first and the last value of a tensor, and the sums of its first and its last row, divided by ``unit``.

    The sums are exact before they are rounded, and so do not depend on the order of adding.
    """
    values = _values(tensor)
    rows = values.reshape(len(values), -1)
    first, last = rows[0].tolist(), rows[-1].tolist()
    return [number / unit for number in (first[0], last[-1], math.fsum(first), math.fsum(last))]


def record(tensor: Tensor, unit: float) -> str:
    """The checksum and the fingerprint as one line of text, about a hundred characters.

    Args:
        unit: the standard deviation that the tensor was drawn with.
    """
    return " ".join([checksum(tensor), *(f"{number:.5f}" for number in fingerprint(tensor, unit))])


def check(key: str, tensor: Tensor, unit: float, recorded: str, rule: int, seed: int) -> None:
    """Check that a tensor drawn again is the one that was recorded.

    It is if its bits are; also if it agrees to ``TOLERANCE``: by its fingerprint or, where an earlier version recorded
    none, because torch still draws what it drew then. That the last bits may be others is said to the user, once.

    Args:
        unit: the standard deviation that the tensor was drawn with.
        rule: number of the rule that it was drawn by.
        seed: what it was drawn from.

    Raises:
        UsageError: it is another tensor.
    """
    known, *numbers = recorded.split()
    same, of_torch = known == checksum(tensor), rule == drawing_by_torch.RULE
    if not same:
        agrees = _agree(tensor, unit, numbers) if numbers else of_torch and drawing_by_torch.holds(TOLERANCE)
        if not agrees:
            way_out = (
                f"the frozen {key} drawn from it by rule {rule} is not the one this adapter was trained against "
                f"(SHA-256 {checksum(tensor)[:12]} instead of {known[:12]}); take the adapter from where it was made"
            )
            raise UsageError("seed", seed, way_out)
    if of_torch or not same:
        from nemo_tiedlora.console import note  # here, because few need it and typer takes a while

        origin = ", that of earlier versions, whose last bits depend on the CPU" if of_torch else ""
        note(
            f"the frozen factors are drawn by rule {rule}{origin}; they agree with those that the adapter was trained "
            f"against to {TOLERANCE:g}"
        )


def _agree(tensor: Tensor, unit: float, recorded: list[str]) -> bool:
    length = math.prod(tensor.shape[1:])
    tolerances = (TOLERANCE, TOLERANCE, length * TOLERANCE, length * TOLERANCE)
    numbers = zip(fingerprint(tensor, unit), recorded, tolerances, strict=True)
    return all(abs(number - float(known)) <= tolerance for number, known, tolerance in numbers)


def check_records(name: str, given: object) -> None:
    """Raise ``UsageError`` unless ``given`` is a mapping from keys to records."""
    if not isinstance(given, dict):
        raise UsageError(name, given, "must be a mapping from the keys of frozen tensors to what training recorded")
    for key, text in given.items():
        if not isinstance(text, str) or not RECORD.fullmatch(text):
            raise UsageError(name, text, f"not what training records of {key}: a SHA-256 and four numbers")


def _values(tensor: Tensor) -> numpy.ndarray:
    return tensor.detach().float().contiguous().cpu().numpy()
