"""Taking a model over and giving it back hold about one tensor, whatever the size of the model."""

import peak
import pytest


@pytest.mark.thorough
def test_no_more_than_two_of_the_largest_tensor_are_held(tmp_path):
    peaks = peak.peaks(tmp_path)
    assert all(0.9 < held < 2 for held in peaks.values()), peaks
