"""How adapter tensors start, and how a frozen one is drawn again exactly as it was."""

import hashlib
import math
from dataclasses import dataclass

import torch

from nemo_tiedlora.errors import UsageError, check_choice

#: Standard deviation of each initialiser for a matrix of shape (fan_out, fan_in).
STD = {
    "normal": lambda fan_out, fan_in: 1 / math.sqrt(fan_in),
    "kaiming_uniform": lambda fan_out, fan_in: 1 / math.sqrt(3 * fan_in),  # a = sqrt(5), as torch.nn.Linear starts
    "kaiming_normal": lambda fan_out, fan_in: math.sqrt(2 / fan_in),
    "xavier": lambda fan_out, fan_in: math.sqrt(2 / (fan_in + fan_out)),
}
CONSTANTS = {"zeros": 0.0, "ones": 1.0}
#: Starts as the length of each row of the layer's frozen weight.
ROW_NORMS = "row_norms"


@dataclass(frozen=True)
class Init:
    """A named start value.

    Args:
        kind: ``normal`` (std 1/sqrt(fan_in), so that it does not depend on the width), ``kaiming_uniform``
            (a=sqrt(5)), ``kaiming_normal``, ``xavier`` (normal), ``zeros`` or ``ones``; or ``row_norms``, the lengths
            of the rows of the layer's frozen weight.
        std: standard deviation to use in place of the one that ``kind`` derives from the shape.

    Raises:
        UsageError: for an unknown kind or a standard deviation that is not positive.
    """

    kind: str
    std: float | None = None

    def __post_init__(self):
        check_choice("init", self.kind, (*STD, *CONSTANTS, ROW_NORMS))
        if self.std is not None and (self.kind not in STD or not self.std > 0):
            raise UsageError("std", self.std, f"must be > 0, and goes with {', '.join(STD)} only")

    @property
    def random(self) -> bool:
        return self.kind in STD

    def draw(self, shape: tuple[int, ...], seed: int, key: str) -> torch.Tensor:
        """The whole (unsharded) float32 tensor called ``key``.

        Depends on ``seed``, ``key`` and ``shape`` alone: not on the order of creation, on other tensors or on the
        parallel layout, so every rank and every later process draws the same values.
        """
        if not self.random:
            return torch.full(shape, CONSTANTS[self.kind])
        digest = hashlib.sha256(f"{seed}:{key}".encode()).digest()
        generator = torch.Generator().manual_seed(int.from_bytes(digest[:8], "big") >> 1)
        std = self.std or STD[self.kind](*shape)
        if self.kind == "kaiming_uniform":
            bound = math.sqrt(3) * std
            return torch.empty(shape).uniform_(-bound, bound, generator=generator)
        return torch.empty(shape).normal_(0.0, std, generator=generator)


def checksum(tensor: torch.Tensor) -> str:
    """SHA-256 of a tensor's float32 values in row-major order (hexadecimal)."""
    return hashlib.sha256(tensor.detach().float().contiguous().cpu().numpy().astype("<f4").tobytes()).hexdigest()
