"""Normalised subspace similarity (CondLoRA, equation 2):

    φ(X, Y, i, j) = ‖U_Xⁱᵀ U_Yʲ‖_F² / min(i, j)  ∈ [0, 1]

U_Xⁱ are the i top left, or right, singular vectors of X. It is 1 if one of the two spaces contains the other. Of random
spaces with i and j dimensions in n it is max(i, j) / n on average.
"""

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from nemo_tiedlora.analysis.heatmap import Panel, short
from nemo_tiedlora.errors import UsageError
from nemo_tiedlora.variants import Factors, Site

#: Singular vectors, as columns in order, by what they are of. Of an adapter: ``A`` the right ones of A, ``B`` the left
#: ones of B (CondLoRA, section 4.2), ``ΔW left`` and ``ΔW right`` both of B A; of W, those on the same sides.
Vectors = dict[str, Tensor]


def left_vectors(X: Tensor) -> Tensor:
    """The left singular vectors of X (n, m): (n, rank of X), float64."""
    U, S, _ = torch.linalg.svd(X.double(), full_matrices=False)
    return U[:, : _rank(S, X.shape)]


def _rank(S: Tensor, shape: tuple[int, ...]) -> int:
    """How many of the singular values S are more than rounding; the vectors of the others could be any."""
    return int((S > S[0] * max(shape) * torch.finfo(S.dtype).eps).sum())


def similarity(X: Tensor, Y: Tensor, i: int, j: int, side: str = "left") -> float:
    """φ(X, Y, i, j) by left singular vectors of X (n, m) and Y (n, k), or right ones of X (m, n) and Y (k, n).

    Raises:
        UsageError: i or j is not in 1 to the rank of its matrix.
    """
    if side == "right":
        X, Y = X.T, Y.T
    U, V = left_vectors(X), left_vectors(Y)
    for name, value, vectors in (("i", i, U), ("j", j, V)):
        if not 1 <= value <= vectors.shape[1]:
            raise UsageError(name, value, f"must be 1 to the matrix's rank, {vectors.shape[1]}")
    return float(grid(U[:, :i], V[:, :j])[-1, -1])


def grid(U: Tensor, V: Tensor) -> Tensor:
    """φ for all i and j at once, from singular vectors U (n, i_max) and V (n, j_max): (i_max, j_max)."""
    squares = (U.T @ V).square().cumsum(0).cumsum(1)
    i, j = (torch.arange(1, size + 1, device=U.device) for size in squares.shape)
    return squares / torch.minimum(i[:, None], j)


def adapter_vectors(factors: Factors) -> Vectors:
    """The singular vectors of A (rank, in), B (out, rank) and ΔW = B A; a gain (DoRA) is no part of it.

    ΔW (out, in) is never formed: with B = Q R and Aᵀ = P T it is Q (R Tᵀ) Pᵀ, and R Tᵀ is rank × rank.
    """
    A, B = factors.A.double(), factors.B.double()
    Q, R = torch.linalg.qr(B)
    P, T = torch.linalg.qr(A.T)
    U, S, Vh = torch.linalg.svd(R @ T.T)
    rank = _rank(S, (B.shape[0], A.shape[1]))
    return {
        "A": left_vectors(A.T),
        "B": left_vectors(B),
        "ΔW left": Q @ U[:, :rank],
        "ΔW right": P @ Vh[:rank].T,
    }


def weight_vectors(weight: Tensor, rank: int) -> Vectors:
    """The ``rank`` top singular vectors of W (out, in)."""
    U, _, Vh = torch.linalg.svd(weight.double(), full_matrices=False)
    left, right = U[:, :rank].clone(), Vh[:rank].T.clone()
    return {"A": right, "B": left, "ΔW left": left, "ΔW right": right}


def compare(ours: Mapping[Site, Vectors], theirs: Mapping[Site, Vectors]) -> dict[str, Any]:
    """φ by target and part for all i and j: ``layers`` has each layer's grid, ``mean`` their mean up to the smallest
    rank of any. Layers whose ΔW is 0 have no subspace and are left out.

    Raises:
        UsageError: no layer is left.
    """
    compared: dict[str, Any] = {}
    for site in ours:
        if site not in theirs or any(vectors[site]["ΔW left"].shape[1] == 0 for vectors in (ours, theirs)):
            continue
        for part, vectors in ours[site].items():
            grids = compared.setdefault(site.target, {}).setdefault(part, {"layers": {}})["layers"]
            grids[site.layer] = grid(vectors, theirs[site][part])
    if not compared:
        raise UsageError("adapter", "layers", "none has a ΔW other than 0 on both sides: train it, or name another")
    for parts in compared.values():
        for found in parts.values():
            grids = found["layers"].values()
            rows, columns = (min(one.shape[axis] for one in grids) for axis in (0, 1))
            found["mean"] = torch.stack([one[:rows, :columns] for one in grids]).mean(0).tolist()
            found["layers"] = {layer: one.tolist() for layer, one in found["layers"].items()}
    return compared


def panels(compared: Mapping[str, Any], versus: str) -> list[list[Panel]]:
    """One row of heat maps per target, of the means over layers."""
    return [[_panel(f"{title}: {part}", one["mean"], versus) for part, one in parts.items()]
            for title, parts in zip(short(list(compared)), compared.values(), strict=True)]  # fmt: skip


def _panel(title: str, mean: list[list[float]], versus: str) -> Panel:
    rows, columns = range(1, 1 + len(mean)), range(1, 1 + len(mean[0]))
    return Panel(mean, title, rows, columns, "i, of the adapter", f"j, of {versus}")
