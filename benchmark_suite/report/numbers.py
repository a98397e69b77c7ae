"""How numbers are written in the report."""

from collections.abc import Iterable


def text(value: object) -> str:
    """Anything; nothing for None."""
    return "" if value is None else str(value)


def score(value: float | None) -> str:
    """A metric, to two decimals as in the papers."""
    return "" if value is None else f"{value:.2f}"


def signed(value: float | None) -> str:
    """A difference of metrics."""
    return "" if value is None else f"{value:+.2f}"


def count(value: float | None) -> str:
    """Parameters, steps, tokens per second."""
    return "" if value is None else f"{value:,.0f}"


def percent(value: float | None) -> str:
    """To one decimal, or two significant digits below 1 %."""
    return "" if value is None else f"{value:.1f} %" if value >= 1 else f"{value:.2g} %"


def times(value: float | None) -> str:
    """A ratio."""
    return "" if value is None else f"{value:.2f}×"


def p_value(value: float | None) -> str:
    """To four decimals, which is what 10,000 resamples can tell."""
    return "" if value is None else f"{value:.4f}"


def listed(values: Iterable[object] | None) -> str:
    """Seeds, learning rates."""
    return (
        ""
        if values is None
        else ", ".join(f"{value:g}" if isinstance(value, float) else str(value) for value in values)
    )


def size(value: float | None) -> str:
    """Bytes, in binary units."""
    if value is None:
        return ""
    for unit in ("B", "KiB", "MiB"):
        if value < 1024:
            return f"{value:.0f} {unit}" if unit == "B" else f"{value:.1f} {unit}"
        value /= 1024
    return f"{value:.2f} GiB"


def seconds(value: float | None) -> str:
    """A duration."""
    if value is None:
        return ""
    return f"{value:.1f} s" if value < 60 else f"{value / 60:.1f} min" if value < 3600 else f"{value / 3600:.1f} h"
