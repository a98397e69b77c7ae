"""Conversion matrices: what takes each layer's frozen weight to its factors (CondLoRA, section 3, figure 1).

    W_lᵀ C_A = A_lᵀ        C_A = (W_lᵀ)⁺ A_lᵀ: (out, rank)                                          (equation 3)
    W_l  C_B = B_l         C_B =  W_l⁺  B_l : (in, rank)                                            (equation 4)

W (out, in) is in torch layout. The paper writes W⁻¹ for both, which fits square weights only, and its W in equation 3
is that of its equation 5, in which A_l = θ_Aᵀ W_l: so C_A and C_B are the θ_A and θ_B that CondLoRA would need for this
layer. ⁺ is the pseudoinverse: the smallest C among those that come closest.
"""

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from nemo_tiedlora.analysis.heatmap import Panel, short
from nemo_tiedlora.analysis.layers import off_diagonal_mean
from nemo_tiedlora.analysis.subspace import grid, left_vectors
from nemo_tiedlora.errors import UsageError
from nemo_tiedlora.variants import Factors, Site


def conversion_matrices(weight: Tensor, factors: Factors) -> tuple[Tensor, Tensor]:
    """C_A (out, rank) and C_B (in, rank) of a layer, float64."""
    inverse = torch.linalg.pinv(weight.double())
    return inverse.T @ factors.A.double().T, inverse @ factors.B.double()


def similarity_matrix(matrices: Sequence[Tensor]) -> list[list[float]]:
    """φ(C_l, C_m, rank, rank) of the left singular vectors of any two layers' matrices (n, rank): layers × layers."""
    vectors = [left_vectors(matrix) for matrix in matrices]
    return [[float(grid(U, V)[-1, -1]) for V in vectors] for U in vectors]


def random_matrices(matrices: Sequence[Tensor], seed: int) -> list[Tensor]:
    """Gaussian matrices of the same shapes, to compare with."""
    generator = torch.Generator().manual_seed(seed)
    return [torch.randn(matrix.shape, generator=generator, dtype=torch.float64) for matrix in matrices]


def compare(matrices: Mapping[Site, tuple[Tensor, Tensor]]) -> dict[str, Any]:
    """Each target's layers and the similarity of their conversion matrices, ``A`` and ``B``, and of random ones.

    ``average`` is that of two different layers, as in figure 1. Layers with C = 0 have no subspace and are left out.

    Raises:
        UsageError: no layer is left.
    """
    trained = {site: pair for site, pair in matrices.items() if all(matrix.any() for matrix in pair)}
    if not trained:
        raise UsageError("adapter", "layers", "all have A = 0 or B = 0, as before training: train it, or name another")
    compared: dict[str, Any] = {}
    for target in dict.fromkeys(site.target for site in trained):
        sites = [site for site in trained if site.target == target]
        of_A, of_B = ([trained[site][factor] for site in sites] for factor in (0, 1))
        found = {"A": of_A, "B": of_B, "random A": random_matrices(of_A, 0), "random B": random_matrices(of_B, 1)}
        compared[target] = {"layers": [site.layer for site in sites]}
        for name, ones in found.items():
            similarity = similarity_matrix(ones)
            compared[target][name] = {"average": off_diagonal_mean(similarity), "similarity": similarity}
    return compared


def panels(compared: Mapping[str, Any]) -> list[list[Panel]]:
    """One row of heat maps per target."""
    return [
        [
            Panel(one["similarity"], f"{title}: {name}", found["layers"], found["layers"])
            for name, one in found.items()
            if name != "layers"
        ]
        for title, found in zip(short(list(compared)), compared.values(), strict=True)
    ]
