"""Rule 1, by which earlier versions drew adapter tensors: torch's generator. Only for adapters that were made with it.

Its last bits depend on the CPU and on torch: 38 % of a normal draw differ between processors with and without AVX2, by
at most 3e-6 standard deviations. The present rule is in ``drawing``.
"""

import hashlib

import torch
from torch import Tensor

#: The number of this rule; adapter files that record none were made with it.
RULE = 1
#: Some values of the (8, 2) draws of scale 1 from seed 0 under the key ``known``, and their places.
PLACES = [0, 1, 2, 15]
KNOWN_NORMAL = [-0.2872699, 0.0526663, -0.7841110, -0.7778700]
KNOWN_UNIFORM = [0.7170739, -0.8057804, -0.4464974, 0.4993612]


def normal(shape: tuple[int, ...], std: float, seed: int, key: str) -> Tensor:
    """Normal float32 values of mean 0, of the tensor called ``key``."""
    return torch.empty(shape).normal_(0.0, std, generator=_generator(seed, key))


def uniform(shape: tuple[int, ...], bound: float, seed: int, key: str) -> Tensor:
    """Float32 values, uniform between −``bound`` and ``bound``."""
    return torch.empty(shape).uniform_(-bound, bound, generator=_generator(seed, key))


def holds(tolerance: float) -> bool:
    """Whether the installed torch still draws by this rule, to ``tolerance`` standard deviations."""
    drawn = torch.stack([draw((8, 2), 1.0, 0, "known").flatten()[PLACES] for draw in (normal, uniform)])
    return bool(((drawn - torch.tensor([KNOWN_NORMAL, KNOWN_UNIFORM])).abs() <= tolerance).all())


def _generator(seed: int, key: str) -> torch.Generator:
    digest = hashlib.sha256(f"{seed}:{key}".encode()).digest()
    return torch.Generator().manual_seed(int.from_bytes(digest[:8], "big") >> 1)
