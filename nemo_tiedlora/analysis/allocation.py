"""Which modules DynaLoRA trained, and for how long (figure 5)."""

import json
from dataclasses import dataclass
from pathlib import Path

from nemo_tiedlora.analysis.heatmap import Panel
from nemo_tiedlora.errors import UsageError


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
        log = json.loads(path.read_text(encoding="utf-8"))
        steps = {_module(name): count for name, count in zip(log["modules"], log["active_steps"], strict=True)}
        if not steps or not all(type(count) is int and count >= 0 for count in steps.values()):
            raise ValueError("active_steps are whole numbers")
    except (ValueError, KeyError, TypeError, AttributeError):
        way_out = 'not an allocation log: {"modules": ["attention_qkv.0", ...], "active_steps": [...]}'
        raise UsageError("file", str(path), way_out) from None
    targets = list(dict.fromkeys(target for target, _ in steps))
    layers = sorted({layer for _, layer in steps})
    return Allocation(targets, layers, [[steps.get((target, layer)) for target in targets] for layer in layers])


def _module(name: str) -> tuple[str, int]:
    target, layer = name.rsplit(".", 1)
    return target, int(layer)


def panel(allocation: Allocation) -> Panel:
    """The heat map of figure 5."""
    title = "Steps for which a module was active"
    return Panel(allocation.active_steps, title, allocation.layers, allocation.targets, "layer", "module")
