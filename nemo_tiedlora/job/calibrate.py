"""Which layers of a base are similar: its outputs over a calibration text (ShareLoRA, section 3.1)."""

import hashlib
import json
import os
import subprocess
import sys
import time
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import Any

from nemo_tiedlora.analysis.layers import similarity_matrix
from nemo_tiedlora.console import progress
from nemo_tiedlora.errors import UsageError, check_choice, closest
from nemo_tiedlora.files import content_of
from nemo_tiedlora.ranks import is_first_rank
from nemo_tiedlora.variants.config import check_number
from nemo_tiedlora.variants.groups import GROUPINGS


@dataclass(frozen=True)
class Calibration:
    """How to find layers that can share factors.

    Args:
        data: calibration text, JSONL or one text per line.
        field: field of the JSONL rows.
        samples: texts to use, drawn from all.
        seed: of the draw.
        length: tokens of a text to use.
        threshold: least similarity of layers that share.
        similarity: ``angular`` or ``cosine``.
        grouping: ``complete`` or ``greedy``.

    Raises:
        UsageError: a value that makes no sense.
    """

    data: str
    field: str = "text"
    samples: int = 256
    seed: int = 1234
    length: int = 512
    threshold: float = 0.85
    similarity: str = "angular"
    grouping: str = "complete"

    def __post_init__(self):
        check_choice("similarity", self.similarity, ("angular", "cosine"))
        check_choice("grouping", self.grouping, GROUPINGS)
        check_number("threshold", self.threshold)
        for name, least in (("samples", 1), ("length", 1), ("seed", 0)):
            if type(getattr(self, name)) is not int or getattr(self, name) < least:
                raise UsageError(name, getattr(self, name), f"must be a whole number from {least}")

    @classmethod
    def of(cls, settings: dict[str, Any]) -> "Calibration":
        """From a mapping under ``groups``."""
        known = [item.name for item in fields(cls)]
        for name in settings:
            if name not in known:
                raise UsageError(name, settings[name], f"unknown setting; {closest(name, known)}").under("groups")
        if "data" not in settings:
            raise UsageError("groups.data", None, "name a calibration text, JSONL or one text per line")
        try:
            return cls(**settings)
        except UsageError as error:
            raise error.under("groups") from None

    def identity(self, base: Path) -> str:
        """Of the groups that it finds in ``base``: twelve hexadecimal digits, of all that decides them."""
        decides = asdict(self) | {"data": content_of(Path(self.data)), "base": content_of(base)}
        return hashlib.sha256(json.dumps(decides).encode()).hexdigest()[:12]


def groups_file(calibration: Calibration, base: Path, path: Path) -> Path:
    """Run ``tiedlora groups`` into ``path`` unless it is there, in a process of its own: Megatron's state is global.

    All ranks may call it; rank 0 does the work.
    """
    if is_first_rank() and not path.exists():
        alone = {name: value for name, value in os.environ.items() if name not in _RENDEZVOUS}
        options = [f"--{name}={value}" for name, value in asdict(calibration).items()]
        command = [sys.executable, "-m", "nemo_tiedlora.cli", "groups", f"--base={base}", f"--out={path}", *options]
        done = subprocess.run(command, env=alone, stdout=subprocess.DEVNULL)
        if done.returncode:
            raise UsageError("groups", asdict(calibration), "calibration failed; its message is above")
    while not path.exists():
        time.sleep(0.2)
    return path


#: What makes a process one of several ranks.
_RENDEZVOUS = {"RANK", "LOCAL_RANK", "WORLD_SIZE", "LOCAL_WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT"}


def layer_outputs(model, texts: Sequence[str], length: int) -> Iterator:
    """For each text, every layer's output at the last token: a (layers, hidden) float32 tensor.

    Args:
        model: a NeMo GPT on one rank.
        texts: what to run it on.
        length: tokens of a text that are used, at most.
    """
    import torch

    outputs = []
    hooks = [
        layer.register_forward_hook(lambda _, __, output: outputs.append(output[0][-1, 0].detach().float().cpu()))
        for layer in model.model.decoder.layers
    ]
    device = next(model.parameters()).device
    try:
        for text in texts:
            ids = model.tokenizer.text_to_ids(text)[:length]
            if not ids:
                continue
            tokens = torch.tensor([ids], device=device)
            outputs.clear()
            with torch.no_grad():
                model.model(tokens, torch.arange(len(ids), device=device)[None], None)
            yield torch.stack(outputs)
    finally:
        for hook in hooks:
            hook.remove()


def layer_similarity(base: Path, texts: Sequence[str], length: int, kind: str) -> list[list[float]]:
    """Load a base and compare its layers' outputs over ``texts``: layers × layers.

    Args:
        kind: ``angular`` or ``cosine``.
    """
    from nemo_tiedlora.job.generate import generator

    with generator(base) as loaded:
        outputs = layer_outputs(loaded.model, texts, length)
        return similarity_matrix(progress(outputs, "calibrating", len(texts)), kind)
