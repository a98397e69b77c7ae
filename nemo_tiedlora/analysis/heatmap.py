"""Heat maps as PNG."""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import matplotlib
import numpy

from nemo_tiedlora.files import replacing

#: Characters of all columns' names that fit below a panel side by side.
WIDEST = 40


@dataclass(frozen=True)
class Panel:
    """One heat map; its first row is at the bottom.

    Args:
        values: rows × columns; None is left blank.
        title: what it shows.
        rows, columns: their names.
        ylabel, xlabel: what rows and columns are.
        frames: groups of rows and columns, counted from 0, whose common cells are framed.
    """

    values: Sequence[Sequence[float | None]]
    title: str
    rows: Sequence[object]
    columns: Sequence[object]
    ylabel: str = "layer"
    xlabel: str = "layer"
    frames: Sequence[Sequence[int]] = ()


def short(names: Sequence[str]) -> list[str]:
    """Names of modules without the path that all of them begin with."""
    parts = [name.split(".") for name in names]
    shared = 0
    while all(len(one) > shared + 1 and one[shared] == parts[0][shared] for one in parts):
        shared += 1
    return [".".join(one[shared:]) for one in parts]


def draw(panels: Sequence[Sequence[Panel]], label: str, path: Path) -> None:
    """Draw rows of heat maps, all with the same colour scale ``label`` so that they can be compared."""
    matplotlib.use("Agg")
    from matplotlib import pyplot

    height, width = len(panels), max(map(len, panels))
    size = 1.5 + 4.2 * width, 4.2 * height
    figure, grid = pyplot.subplots(height, width, figsize=size, layout="compressed", squeeze=False)
    values = [numpy.array(panel.values, dtype=float) for row in panels for panel in row]
    scale = {"vmin": min(map(numpy.nanmin, values)), "vmax": max(map(numpy.nanmax, values))}
    for places, row in zip(grid, panels, strict=True):
        for axes, panel in zip(places, row, strict=True):
            image = _draw(axes, panel, scale)
    figure.colorbar(image, ax=grid, label=label)
    with replacing(path) as unfinished:
        figure.savefig(unfinished, format="png", dpi=120)
    pyplot.close(figure)


def _draw(axes, panel: Panel, scale: dict[str, float]):
    from matplotlib.patches import Rectangle
    from matplotlib.ticker import FuncFormatter, MaxNLocator

    values = numpy.array(panel.values, dtype=float)
    aspect = "equal" if values.shape[0] == values.shape[1] else "auto"
    image = axes.imshow(values, cmap="viridis", origin="lower", interpolation="nearest", aspect=aspect, **scale)
    for axis, names in ((axes.yaxis, panel.rows), (axes.xaxis, panel.columns)):
        axis.set_major_locator(MaxNLocator(integer=True, min_n_ticks=1))
        axis.set_major_formatter(FuncFormatter(lambda at, _, names=names: _name(names, at)))
    if sum(len(str(name)) for name in panel.columns) > WIDEST:
        axes.tick_params(axis="x", labelrotation=90)
    for group in panel.frames:
        for first in group:
            for second in group:
                axes.add_patch(Rectangle((first - 0.5, second - 0.5), 1, 1, fill=False, edgecolor="white", lw=0.8))
    axes.set(ylabel=panel.ylabel, xlabel=panel.xlabel, title=panel.title)
    return image


def _name(names: Sequence[object], at: float) -> str:
    return str(names[int(at)]) if at == int(at) and 0 <= at < len(names) else ""
