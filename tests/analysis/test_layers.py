"""Layer similarity against its definition."""

import numpy
import pytest
import torch

from nemo_tiedlora.analysis import layers
from nemo_tiedlora.errors import UsageError


def test_similarity_follows_the_definition():
    outputs = numpy.random.default_rng(0).normal(size=(5, 3, 8))
    unit = outputs / numpy.linalg.norm(outputs, axis=2, keepdims=True)
    cosines = numpy.clip(unit @ unit.transpose(0, 2, 1), -1, 1)
    expected = {"cosine": cosines.mean(0), "angular": (1 - numpy.arccos(cosines) / numpy.pi).mean(0)}
    for kind in expected:
        ours = layers.similarity_matrix(iter(torch.tensor(outputs)), kind)
        numpy.testing.assert_allclose(ours, expected[kind], rtol=0, atol=1e-7)  # arccos near 1


def test_no_text_with_a_token_is_said():
    with pytest.raises(UsageError, match="none of them has a token"):
        layers.similarity_matrix(iter([]), "angular")


def test_the_average_is_that_of_different_layers():
    assert layers.off_diagonal_mean([[1, 0.2, 0.3], [0.2, 1, 0.7], [0.3, 0.7, 1]]) == pytest.approx(0.4)
    assert layers.off_diagonal_mean([[1]]) is None
