"""Conversion matrices where they are known, and what their similarity then must be."""

import numpy
import pytest
import torch

from nemo_tiedlora.analysis import conversion
from nemo_tiedlora.errors import UsageError
from nemo_tiedlora.variants import Factors, Site

RANK, LAYERS = 4, 5


def normal(seed, *shape):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def conditional(out, in_):
    """W, A_l = θ_Aᵀ W_l and B_l = W_l θ_B of some layers, and the θ."""
    theta_A, theta_B = normal(0, out, RANK), normal(1, in_, RANK)
    weights = [normal(10 + layer, out, in_) for layer in range(LAYERS)]
    return weights, [Factors(theta_A.T @ W, W @ theta_B, 1.0) for W in weights], theta_A, theta_B


def sites(out, in_):
    return [Site("attention_qkv", layer, in_, out) for layer in range(LAYERS)]


def test_factors_made_by_one_linear_map_are_converted_by_it():
    weights, factors, theta_A, theta_B = conditional(32, 32)
    matrices = [conversion.conversion_matrices(W, pair) for W, pair in zip(weights, factors, strict=True)]
    for C_A, C_B in matrices:
        numpy.testing.assert_allclose(C_A.numpy(), theta_A.numpy(), rtol=0, atol=1e-8)
        numpy.testing.assert_allclose(C_B.numpy(), theta_B.numpy(), rtol=0, atol=1e-8)
    found = conversion.compare(dict(zip(sites(32, 32), matrices, strict=True)))["attention_qkv"]
    for name in ("A", "B"):
        numpy.testing.assert_allclose(found[name]["similarity"], 1, rtol=1e-9)


@pytest.mark.parametrize(("out", "in_"), [(36, 12), (12, 36)])
def test_rectangular_weights_take_the_smallest_conversion(out, in_):
    weights, factors, _, _ = conditional(out, in_)
    C_A, C_B = conversion.conversion_matrices(weights[0], factors[0])
    W, A, B = weights[0].numpy(), factors[0].A.numpy(), factors[0].B.numpy()
    numpy.testing.assert_allclose(C_A.numpy(), numpy.linalg.lstsq(W.T, A.T, rcond=None)[0], rtol=0, atol=1e-9)
    numpy.testing.assert_allclose(C_B.numpy(), numpy.linalg.lstsq(W, B, rcond=None)[0], rtol=0, atol=1e-9)


def test_unrelated_factors_are_converted_as_differently_as_random_ones():
    n = 200
    matrices = {}
    for site in sites(n, n):
        pair = Factors(normal(50 + site.layer, RANK, n), normal(70 + site.layer, n, RANK), 1.0)
        matrices[site] = conversion.conversion_matrices(normal(90 + site.layer, n, n), pair)
    found = conversion.compare(matrices)["attention_qkv"]
    assert found["layers"] == list(range(LAYERS))
    for name in ("A", "B", "random A", "random B"):
        similarity = numpy.array(found[name]["similarity"])
        numpy.testing.assert_allclose(similarity.diagonal(), 1, rtol=1e-9)
        others = similarity[~numpy.eye(LAYERS, dtype=bool)]
        assert found[name]["average"] == pytest.approx(others.mean(), rel=1e-12)
        assert others.mean() == pytest.approx(RANK / n, abs=0.02)


def test_similarity_is_by_the_left_singular_vectors():
    matrices = [normal(seed, 30, RANK) for seed in range(3)]
    ours = conversion.similarity_matrix(matrices)
    bases = [numpy.linalg.svd(matrix.numpy(), full_matrices=False)[0] for matrix in matrices]
    expected = [[numpy.linalg.norm(U.T @ V, "fro") ** 2 / RANK for V in bases] for U in bases]
    numpy.testing.assert_allclose(ours, expected, rtol=1e-9)


def test_untrained_layers_are_left_out():
    weights, factors, _, _ = conditional(8, 8)
    matrices = [conversion.conversion_matrices(W, pair) for W, pair in zip(weights, factors, strict=True)]
    matrices[2] = conversion.conversion_matrices(weights[2], factors[2]._replace(B=torch.zeros(8, RANK)))
    by_site = dict(zip(sites(8, 8), matrices, strict=True))
    assert conversion.compare(by_site)["attention_qkv"]["layers"] == [0, 1, 3, 4]
    with pytest.raises(UsageError, match="as before training"):
        conversion.compare(dict.fromkeys(by_site, matrices[2]))
