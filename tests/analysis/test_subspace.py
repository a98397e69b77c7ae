"""Subspace similarity against numpy's SVD of the formed matrices, and its properties."""

import numpy
import pytest
import torch

from nemo_tiedlora.analysis import subspace
from nemo_tiedlora.errors import UsageError
from nemo_tiedlora.variants import Factors, Site


def phi(X, Y, i, j):
    """The definition, by left singular vectors, in numpy."""
    U, V = numpy.linalg.svd(X)[0][:, :i], numpy.linalg.svd(Y)[0][:, :j]
    return numpy.linalg.norm(U.T @ V, "fro") ** 2 / min(i, j)


def pair(seed, rank=4, out=40, in_=24):
    draw = torch.Generator().manual_seed(seed)
    A, B = torch.randn(rank, in_, generator=draw), torch.randn(out, rank, generator=draw)
    return Factors(A, B, 0.5)


def numpy_matrices(factors):
    """What each part's left singular vectors are of."""
    A, B = factors.A.double().numpy(), factors.B.double().numpy()
    return {"A": A.T, "B": B, "ΔW left": B @ A, "ΔW right": (B @ A).T}


@pytest.mark.parametrize("part", ["A", "B", "ΔW left", "ΔW right"])
def test_the_grid_of_two_adapters_is_that_of_the_formed_products(part):
    first, second = pair(0), pair(1, rank=6)
    ours = subspace.grid(subspace.adapter_vectors(first)[part], subspace.adapter_vectors(second)[part])
    X, Y = numpy_matrices(first)[part], numpy_matrices(second)[part]
    expected = [[phi(X, Y, i, j) for j in range(1, 7)] for i in range(1, 5)]
    numpy.testing.assert_allclose(ours.numpy(), expected, rtol=1e-9, atol=1e-12)


@pytest.mark.parametrize("part", ["A", "B", "ΔW left", "ΔW right"])
def test_the_grid_against_w_takes_the_same_side_of_w(part):
    factors, weight = pair(2), torch.randn(40, 24, generator=torch.Generator().manual_seed(3))
    ours = subspace.grid(subspace.adapter_vectors(factors)[part], subspace.weight_vectors(weight, 4)[part])
    W = weight.double().numpy()
    versus = W if part in ("B", "ΔW left") else W.T
    expected = [[phi(numpy_matrices(factors)[part], versus, i, j) for j in range(1, 5)] for i in range(1, 5)]
    numpy.testing.assert_allclose(ours.numpy(), expected, rtol=1e-9, atol=1e-12)


def test_similarity_by_left_and_by_right_vectors():
    draw = numpy.random.default_rng(0)
    X, Y = draw.normal(size=(12, 5)), draw.normal(size=(12, 8))
    left = subspace.similarity(torch.tensor(X), torch.tensor(Y), 3, 4)
    right = subspace.similarity(torch.tensor(X.T), torch.tensor(Y.T), 3, 4, side="right")
    assert left == pytest.approx(phi(X, Y, 3, 4), rel=1e-9)
    assert right == pytest.approx(phi(X, Y, 3, 4), rel=1e-9)


@pytest.mark.parametrize(("i", "j"), [(0, 1), (6, 1), (1, 3)])
def test_more_vectors_than_the_rank_are_refused(i, j):
    draw = torch.Generator().manual_seed(0)
    X = torch.randn(12, 5, generator=draw)
    Y = torch.randn(12, 2, generator=draw)
    with pytest.raises(UsageError, match="must be 1 to the matrix's rank"):
        subspace.similarity(X, Y, i, j)


def test_a_matrix_is_like_itself_and_unlike_a_random_one():
    n, rank = 600, 6
    factors, other = pair(4, rank, n, n), pair(5, rank, n, n)
    vectors, others = subspace.adapter_vectors(factors), subspace.adapter_vectors(other)
    for part in vectors:
        numpy.testing.assert_allclose(subspace.grid(vectors[part], vectors[part]).numpy(), 1, rtol=1e-9)
        assert float(subspace.grid(vectors[part], others[part])[-1, -1]) == pytest.approx(rank / n, abs=0.02)


def test_the_mean_is_over_layers_and_untrained_ones_are_left_out():
    sites = [Site("attention_qkv", layer, 24, 40) for layer in range(3)] + [Site("mlp_fc2", 0, 24, 40)]
    ours = {site: pair(seed) for seed, site in enumerate(sites)}
    theirs = {site: pair(10 + seed, rank=3) for seed, site in enumerate(sites[:3])}
    ours[sites[1]] = ours[sites[1]]._replace(B=torch.zeros(40, 4))
    vectors = [{site: subspace.adapter_vectors(one) for site, one in side.items()} for side in (ours, theirs)]
    compared = subspace.compare(*vectors)
    assert list(compared) == ["attention_qkv"] and list(compared["attention_qkv"]["ΔW left"]["layers"]) == [0, 2]
    for part, one in compared["attention_qkv"].items():
        expected = [
            [
                numpy.mean(
                    [phi(numpy_matrices(ours[s])[part], numpy_matrices(theirs[s])[part], i, j) for s in sites[:3:2]]
                )
                for j in range(1, 4)
            ]
            for i in range(1, 5)
        ]
        numpy.testing.assert_allclose(one["mean"], expected, rtol=1e-9, atol=1e-12)


def test_nothing_to_compare_is_said():
    site = Site("attention_qkv", 0, 24, 40)
    trained = {site: subspace.adapter_vectors(pair(0))}
    untrained = {site: subspace.adapter_vectors(pair(0)._replace(B=torch.zeros(40, 4)))}
    for ours, theirs in ((untrained, trained), (trained, untrained), (trained, {})):
        with pytest.raises(UsageError, match="train it"):
            subspace.compare(ours, theirs)
