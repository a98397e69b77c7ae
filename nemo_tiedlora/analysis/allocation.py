"""Which modules DynaLoRA trained, and for how long (figure 5)."""

import json
import re
from dataclasses import dataclass
from pathlib import Path

from nemo_tiedlora.analysis.heatmap import Panel, short
from nemo_tiedlora.errors import UsageError

#: A log, or a number of steps, cannot be larger.
MOST_BYTES, MOST_STEPS = 2**26, 2**53


@dataclass(frozen=True)
class Allocation:
    """Active steps of every module.

    Args:
        targets: kinds of target module.
        layers: 0-based numbers of the adapted layers.
        active_steps: layers × targets; None where a layer has no such module.
    """

    targets: list[str]
    layers: list[int]
    active_steps: list[list[int | None]]


def read(path: Path) -> Allocation:
    """An allocation log: JSON with ``modules`` (``<target>.<layer>``) and the ``active_steps`` of each.

    Raises:
        UsageError: no such file, or something else in it.
    """
    if not path.is_file():
        raise UsageError("file", str(path), "no such file")
    try:
        if path.stat().st_size > MOST_BYTES:
            raise ValueError("too large")
        log = json.loads(path.read_text(encoding="utf-8"))
        steps = {_module(name): count for name, count in zip(log["modules"], log["active_steps"], strict=True)}
        if not steps or len(steps) != len(log["modules"]):
            raise ValueError("a module is there once")
        if not all(type(count) is int and 0 <= count < MOST_STEPS for count in steps.values()):
            raise ValueError("active_steps are whole numbers")
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError):
        way_out = 'not an allocation log: {"modules": ["attention_qkv.0", ...], "active_steps": [...]}'
        raise UsageError("file", str(path), way_out) from None
    targets = list(dict.fromkeys(target for target, _ in steps))
    layers = sorted({layer for _, layer in steps})
    return Allocation(targets, layers, [[steps.get((target, layer)) for target in targets] for layer in layers])


def _module(name: str) -> tuple[str, int]:
    target, layer = re.fullmatch(r"([\w. -]{1,256})\.(\d{1,5})", name, re.ASCII).groups()
    return target, int(layer)


def panel(allocation: Allocation) -> Panel:
    """The heat map of figure 5."""
    title = "Steps for which a module was active"
    return Panel(allocation.active_steps, title, allocation.layers, short(allocation.targets), "layer", "module")
