"""How similar the layers of a model are (ShareLoRA, section 3.1, figure 1)."""

from collections.abc import Iterable

import torch
from torch import Tensor

from nemo_tiedlora.errors import UsageError


def similarity_matrix(outputs: Iterable[Tensor], kind: str) -> list[list[float]]:
    """Layer × layer similarity, averaged over texts.

    Args:
        outputs: (layers, hidden) per text.
        kind: ``cosine``, or ``angular``: 1 − d with the angular distance d = arccos(cos) / π. The paper compares d
            itself with its threshold, but its text, figure 1 and thresholds fit the similarity only.

    Raises:
        UsageError: there are no outputs.
    """
    total, texts = None, 0
    for output in outputs:
        unit = torch.nn.functional.normalize(output.double(), dim=1)
        cosines = (unit @ unit.T).clamp(-1, 1)
        values = cosines if kind == "cosine" else 1 - torch.arccos(cosines) / torch.pi
        total = values if total is None else total + values
        texts += 1
    if not texts:
        raise UsageError("data", "texts", "none of them has a token")
    return (total / texts).tolist()


def off_diagonal_mean(matrix: list[list[float]]) -> float | None:
    """The mean similarity of two different layers; None if there is one layer only."""
    values = [value for i, row in enumerate(matrix) for j, value in enumerate(row) if i != j]
    return sum(values) / len(values) if values else None
