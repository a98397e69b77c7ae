"""Grouping of layers: the published groups, the constraint, and every rule."""

import json
import random

import pytest

from nemo_tiedlora.errors import UsageError
from nemo_tiedlora.variants import groups

#: Published for Llama-7B at threshold 0.85 (ShareLoRA, section 4).
PUBLISHED = [[16, 17], [18, 19], [20, 21, 22], [23, 24, 25, 26, 27], [28, 29, 30]]


def matrix(layers, seed):
    draw = random.Random(seed)
    values = [[1.0] * layers for _ in range(layers)]
    for i in range(layers):
        for j in range(i):
            values[i][j] = values[j][i] = draw.random()
    return values


def block_matrix(blocks, layers=32):
    inside = {layer: number for number, block in enumerate(blocks) for layer in block}
    same = lambda i, j: i == j or (i in inside and inside.get(i) == inside.get(j))  # noqa: E731
    return [[0.9 if same(i, j) else 0.5 for j in range(layers)] for i in range(layers)]


@pytest.mark.parametrize("grouping", groups.GROUPINGS)
def test_blocks_of_similar_layers_are_the_groups(grouping):
    assert groups.GROUPINGS[grouping](block_matrix(PUBLISHED), 0.85) == PUBLISHED


@pytest.mark.parametrize("seed", range(20))
def test_complete_groups_satisfy_the_constraint_and_are_disjoint(seed):
    values = matrix(12, seed)
    found = groups.complete(values, 0.6)
    members = [layer for group in found for layer in group]
    assert len(set(members)) == len(members)
    assert all(values[i][j] >= 0.6 for group in found for i in group for j in group)


def test_greedy_compares_with_the_leader_only():
    values = [[1, 0.9, 0.88], [0.9, 1, 0.2], [0.88, 0.2, 1]]
    assert groups.greedy(values, 0.85) == [[0, 1, 2]]
    assert groups.complete(values, 0.85) == [[0, 1]]


@pytest.mark.parametrize("seed", range(20))
def test_greedy_groups_are_disjoint_and_only_hold_similar_layers(seed):
    values = matrix(12, seed)
    found = groups.greedy(values, 0.8)
    members = [layer for group in found for layer in group]
    assert len(set(members)) == len(members)
    assert all(any(values[i][j] >= 0.8 for j in group if j != i) for group in found for i in group)


def test_no_similar_layers_give_no_group():
    assert groups.complete(matrix(6, 0), 1.1) == groups.greedy(matrix(6, 0), 1.1) == []


def test_odd_even():
    assert groups.odd_even(5) == [[0, 2, 4], [1, 3]]


@pytest.mark.parametrize("shared", [1, 4, 9])
def test_random_adjacent_shares_the_asked_number_of_neighbours(shared):
    found = groups.random_adjacent(12, shared, seed=7)
    assert found == groups.random_adjacent(12, shared, seed=7) != groups.random_adjacent(12, shared, seed=8)
    assert 12 - groups.sources(found, 12) == shared
    assert all(group == list(range(group[0], group[-1] + 1)) for group in found)


def test_the_budget_of_the_published_groups_allows_rank_11():
    assert groups.sources(PUBLISHED, 32) == 22
    assert groups.expanded_rank(8, PUBLISHED, 32) == 11


@pytest.mark.parametrize(
    ("bad", "message"),
    [
        ([[1]], "at least two layers"),
        ([[1, 8]], "layers 0 to 7"),
        ([[1, 2], [2, 3]], "in one group only"),
        (["a"], "at least two layers"),
    ],
)
def test_bad_groups_are_refused(bad, message):
    with pytest.raises(UsageError, match=message):
        groups.check(bad, 8)


def test_groups_are_read_from_a_file(tmp_path):
    (tmp_path / "groups.json").write_text(json.dumps({"groups": [[0, 1]]}))
    assert groups.read(tmp_path / "groups.json") == [[0, 1]]
    (tmp_path / "bad.json").write_text("[")
    for name, message in (("bad.json", "not a file of groups"), ("none.json", "no such file")):
        with pytest.raises(UsageError, match=message):
            groups.read(tmp_path / name)
