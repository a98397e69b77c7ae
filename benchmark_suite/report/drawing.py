"""Drawings as inline SVG that takes its colours from the page, so that light and dark are one drawing."""

import hashlib
import io
import re
from collections.abc import Callable
from dataclasses import dataclass

#: matplotlib insists on real colours: these stand for the page's and are replaced in the finished drawing.
INK, LINE = "#010203", "#010204"
#: How many series the page has colours for.
COLOURS = 12

STYLE = {
    "svg.fonttype": "none",
    "svg.hashsalt": "report",
    "font.family": "sans-serif",
    "font.size": 10,
    "text.parse_math": False,  # a name with dollar signs is a name
    "text.color": INK,
    "axes.labelcolor": INK,
    "axes.edgecolor": LINE,
    "axes.facecolor": "none",
    "figure.facecolor": "none",
    "savefig.facecolor": "none",
    "axes.grid": True,
    "axes.axisbelow": True,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.titlesize": 11,
    "axes.titleweight": "bold",
    "axes.titlelocation": "left",
    "grid.color": LINE,
    "grid.linewidth": 0.6,
    "xtick.minor.visible": False,
    "xtick.color": LINE,
    "ytick.color": LINE,
    "xtick.labelcolor": INK,
    "ytick.labelcolor": INK,
}


@dataclass(frozen=True)
class Plot:
    """One drawing and the sentence that says what it is to who cannot see it."""

    description: str
    svg: str


def series(place: int) -> str:
    """The colour of a series, to draw with."""
    return f"#0103{place % COLOURS:02x}"


def draw(title: str, description: str, paint: Callable, height: float = 3.0) -> Plot:
    """Let ``paint`` draw on axes of its own."""
    import matplotlib
    from matplotlib.backends.backend_svg import FigureCanvasSVG
    from matplotlib.figure import Figure

    drawn = io.StringIO()
    # Not pyplot: it would keep every figure and choose a backend for the whole process.
    with matplotlib.rc_context(STYLE):
        figure = Figure(figsize=(4.4, height), layout="constrained")
        axes = figure.subplots()
        axes.set_title(title)
        paint(axes)
        metadata = dict.fromkeys(("Date", "Creator", "Format", "Type"))
        FigureCanvasSVG(figure).print_svg(drawn, metadata=metadata)
    return Plot(description, _inline(drawn.getvalue()))


def _inline(drawn: str) -> str:
    """An SVG file as part of a page: no prologue, no size, no names that clash with the next one's."""
    svg = drawn[drawn.index("<svg") :]
    name = hashlib.sha256(svg.encode()).hexdigest()[:8]
    svg = re.sub(r"<metadata>.*?</metadata>", "", svg, flags=re.DOTALL)
    svg = re.sub(r' id="[a-zA-Z0-9]+_\d+"', "", svg)
    svg = re.sub(r'( id="|url\(#|href="#)', rf"\g<1>{name}-", svg)
    opening = svg[: svg.index(">")]
    svg = re.sub(r' (width|height)="[^"]*"', "", opening) + svg[len(opening) :]
    svg = svg.replace(INK, "var(--ink)").replace(LINE, "var(--line)")
    return re.sub(r"#0103([0-9a-f]{2})", lambda at: f"var(--series-{int(at[1], 16)})", svg)
