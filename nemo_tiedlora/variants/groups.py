"""Which layers share: from similar outputs, or by rule (ShareLoRA, section 3 and Algorithm 1)."""

import json
import random
from collections.abc import Sequence
from pathlib import Path

from nemo_tiedlora.errors import UsageError

Groups = list[list[int]]
RULES = ("odd_even", "random_adjacent")
#: A file of groups, which also holds the similarities of all pairs of layers, cannot be larger.
MOST_BYTES = 2**26


def complete(similarity: Sequence[Sequence[float]], threshold: float) -> Groups:
    """Groups in which every pair of layers reaches the threshold (the paper's constraint 3).

    Pairs are taken from the most similar down; a pair joins two groups if all their layers are similar enough.
    """
    group_of = {layer: [layer] for layer in range(len(similarity))}
    for i, j in _eligible(similarity, threshold):
        first, second = group_of[i], group_of[j]
        if first is second or any(similarity[a][b] < threshold for a in first for b in second):
            continue
        first.extend(second)
        for layer in second:
            group_of[layer] = first
    return _proper(group_of.values())


def greedy(similarity: Sequence[Sequence[float]], threshold: float) -> Groups:
    """The paper's Algorithm 1 to the letter: followers are compared with their leader only."""
    pairs = _eligible(similarity, threshold)
    open_pairs = {i: sum(1 for a, _ in pairs if a == i) for i, _ in pairs}
    sets: dict[int, list[int]] = {}
    visited: set[int] = set()
    for i, j in pairs:
        open_pairs[i] -= 1
        if i not in visited and j not in visited:
            sets.setdefault(i, [i]).append(j)
            visited.add(j)
            if not open_pairs[i]:
                visited.add(i)
    # A leader that later followed another layer belongs there, as do its own followers' factors to it.
    return _proper(_joined(sets))


GROUPINGS = {"complete": complete, "greedy": greedy}


def odd_even(layers: int) -> Groups:
    """All even layers share, and all odd ones (the paper's naive sharing)."""
    return _proper([list(range(0, layers, 2)), list(range(1, layers, 2))])


def random_adjacent(layers: int, shared: int, seed: int) -> Groups:
    """``shared`` layers follow the one before them, drawn at random (the paper's ShareLoRA* baseline)."""
    followers = set(random.Random(seed).sample(range(1, layers), shared))
    groups: Groups = []
    for layer in range(layers):
        if layer in followers:
            groups[-1].append(layer)
        else:
            groups.append([layer])
    return _proper(groups)


def read(path: str | Path) -> Groups:
    """The groups in a file that ``tiedlora groups`` wrote.

    Raises:
        UsageError: no such file, or something else in it.
    """
    try:
        if Path(path).exists() and not (Path(path).is_file() and Path(path).stat().st_size <= MOST_BYTES):
            raise ValueError
        groups = json.loads(Path(path).read_text(encoding="utf-8"))["groups"]
        if not isinstance(groups, list):
            raise TypeError
        return groups
    except FileNotFoundError:
        raise UsageError(
            "groups", str(path), f"no such file; or write lists of layers, or {' or '.join(RULES)}"
        ) from None
    except (ValueError, KeyError, TypeError, OSError, RecursionError) as error:
        raise UsageError("groups", str(path), f"not a file of groups ({type(error).__name__})") from None


def check(groups: Groups, layers: int) -> Groups:
    """The groups in canonical order, once they are disjoint sets of at least two of the model's layers."""
    if isinstance(groups, dict):
        raise UsageError("groups", groups, "only the fine-tuning job calibrates; run tiedlora groups and name its file")
    if not isinstance(groups, list | tuple):
        raise UsageError("groups", groups, f"write lists of layers, a file, or {' or '.join(RULES)}")
    seen: set[int] = set()
    for group in groups:
        if not isinstance(group, list | tuple) or len(group) < 2:
            raise UsageError("groups", group, "a group is a list of at least two layers")
        for layer in group:
            if not isinstance(layer, int) or isinstance(layer, bool) or not 0 <= layer < layers:
                raise UsageError("groups", layer, f"the model has layers 0 to {layers - 1}")
            if layer in seen:
                raise UsageError("groups", layer, "a layer can be in one group only")
            seen.add(layer)
    return _proper(groups)


def sources(groups: Groups, layers: int) -> int:
    """How many different factor pairs are left: one per group and one per layer outside all groups."""
    return layers - sum(len(group) - 1 for group in groups)


def expanded_rank(rank: int, groups: Groups, layers: int) -> int:
    """The largest rank whose shared factors have no more parameters than unshared ones of ``rank`` (section 3.3)."""
    return layers * rank // sources(groups, layers)


def _eligible(similarity: Sequence[Sequence[float]], threshold: float) -> list[tuple[int, int]]:
    pairs = [(i, j) for i in range(len(similarity)) for j in range(i + 1, len(similarity))]
    reach = [(i, j) for i, j in pairs if similarity[i][j] >= threshold]
    return sorted(reach, key=lambda pair: (-similarity[pair[0]][pair[1]], pair))


def _joined(sets: dict[int, list[int]]) -> Groups:
    """Sets that have a layer in common become one."""
    groups: list[set[int]] = []
    for members in map(set, sets.values()):
        touching = [group for group in groups if group & members]
        groups = [group for group in groups if not group & members] + [members.union(*touching)]
    return [list(group) for group in groups]


def _proper(groups) -> Groups:
    """Each group once, sorted, without those of a single layer."""
    unique = {tuple(sorted(group)) for group in groups if len(group) > 1}
    return [list(group) for group in sorted(unique)]
