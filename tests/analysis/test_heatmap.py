"""Heat maps as pictures."""

import numpy
import pytest
from matplotlib import image

from nemo_tiedlora.analysis.heatmap import Panel, draw, short

#: The ends of the colour scale (viridis).
LOW, HIGH = (68, 1, 84), (253, 231, 37)


def drawn(path, *panels):
    draw([panels], "value", path)
    return image.imread(path)[..., :3] * 255


def share(picture, colour):
    return (numpy.abs(picture - colour) < 2).all(-1).mean()


def panel(*values, **settings):
    return Panel([values], "title", ["row"], range(len(values)), **settings)


def test_all_panels_have_one_colour_scale(tmp_path):
    picture = drawn(tmp_path / "both.png", panel(0, 0), panel(1, 1))
    assert 0.1 < share(picture, LOW) < 0.5 and 0.1 < share(picture, HIGH) < 0.5


def test_what_is_not_there_is_left_blank(tmp_path):
    whole = drawn(tmp_path / "whole.png", panel(0, 0), panel(1, 1))
    half = drawn(tmp_path / "half.png", panel(0, 0), panel(1, None))
    assert 0.3 < share(half, HIGH) / share(whole, HIGH) < 0.7


def test_the_cells_of_a_group_are_framed(tmp_path):
    names, values = range(4), numpy.eye(4).tolist()
    plain = drawn(tmp_path / "plain.png", Panel(values, "title", names, names))
    framed = drawn(tmp_path / "framed.png", Panel(values, "title", names, names, frames=[[0, 1]]))
    rows, columns = numpy.where((plain != framed).any(-1))
    # Layers 0 and 1 are the lower left quarter of the map.
    height, width = plain.shape[:2]
    assert len(rows) and rows.min() > 0.4 * height and columns.max() < 0.6 * width


@pytest.mark.parametrize(
    ("names", "shown"),
    [
        (["attention_qkv", "mlp_fc2"], ["attention_qkv", "mlp_fc2"]),
        (["bert.layer.self.query", "bert.layer.self.value"], ["query", "value"]),
        (["bert.layer.self.query", "bert.layer.dense"], ["self.query", "dense"]),
        (["bert.layer.dense", "bert.layer.dense 4x8"], ["dense", "dense 4x8"]),
        (["bert.layer.self.query"], ["query"]),
        (["a.b", "a.b.c"], ["b", "b.c"]),
    ],
)
def test_names_of_modules_are_shown_from_where_they_differ(names, shown):
    assert short(names) == shown
