"""What is recorded of a frozen tensor, so that the one drawn again can be told from any other."""

import hashlib
import math
import re

import numpy
from torch import Tensor

from nemo_tiedlora.console import note
from nemo_tiedlora.errors import UsageError
from nemo_tiedlora.variants import drawing_by_torch

#: A record: a SHA-256 and, unless an earlier version made it, a fingerprint.
RECORD = re.compile(r"[0-9a-f]{64}( -?\d{1,20}(\.\d{1,20})?(e[+-]\d{1,3})?){4}|[0-9a-f]{64}", re.ASCII)
#: Tensors that differ by no more, in standard deviations, are the same but for rounding.
TOLERANCE = 1e-5


def checksum(tensor: Tensor) -> str:
    """SHA-256 of a tensor's float32 values in row-major order, little-endian (hexadecimal)."""
    return hashlib.sha256(_values(tensor).astype("<f4").tobytes()).hexdigest()


def fingerprint(tensor: Tensor, unit: float) -> list[float]:
    """``unit`` and, divided by it, a tensor's first value, its last one, and the sum of its first and its last row.

    The sum is exact before it is rounded, and so does not depend on the order of adding.

    Args:
        unit: the standard deviation that the tensor was drawn with.
    """
    values = _values(tensor)
    rows = values.reshape(len(values), -1)[[0, -1]].ravel().tolist()
    return [unit, *(number / unit for number in (rows[0], rows[-1], math.fsum(rows)))]


def record(tensor: Tensor, unit: float) -> str:
    """The checksum and the fingerprint as one line of text, about a hundred characters."""
    scale, *numbers = fingerprint(tensor, unit)
    return " ".join([checksum(tensor), f"{scale:.6g}", *(f"{number:.5f}" for number in numbers)])


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
                f"(SHA-256 {checksum(tensor)[:12]} instead of {known[:12]}); its seed or settings were changed"
            )
            raise UsageError("seed", seed, way_out)
    if of_torch or not same:
        origin = ", that of earlier versions, whose last bits depend on the CPU" if of_torch else ""
        note(
            f"the frozen factors are drawn by rule {rule}{origin}; they agree with those that the adapter was trained "
            f"against to {TOLERANCE:g}"
        )


def _agree(tensor: Tensor, unit: float, recorded: list[str]) -> bool:
    tolerances = TOLERANCE * unit, TOLERANCE, TOLERANCE, 2 * math.prod(tensor.shape[1:]) * TOLERANCE
    numbers = zip(fingerprint(tensor, unit), map(float, recorded), tolerances, strict=True)
    return all(abs(number - known) <= tolerance for number, known, tolerance in numbers)


def check_records(name: str, given: object) -> None:
    """Raise ``UsageError`` unless ``given`` is a mapping from keys to records."""
    if not isinstance(given, dict):
        raise UsageError(name, given, "must be a mapping from the keys of frozen tensors to what training recorded")
    for key, text in given.items():
        if not isinstance(text, str) or not RECORD.fullmatch(text):
            raise UsageError(name, text, f"not what training records of {key}: a SHA-256 and four numbers")


def _values(tensor: Tensor) -> numpy.ndarray:
    return tensor.detach().float().contiguous().cpu().numpy()
