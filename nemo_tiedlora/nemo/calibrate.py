"""Which layers of a base are similar: its outputs over a calibration text (ShareLoRA, section 3.1)."""

import hashlib
import json
from collections.abc import Iterator, Sequence
from pathlib import Path

from nemo_tiedlora.analysis.layers import similarity_matrix
from nemo_tiedlora.console import progress
from nemo_tiedlora.errors import UsageError, closest


def read_texts(path: str | Path, samples: int, field: str = "text") -> list[str]:
    """The first ``samples`` texts of a JSONL file (its ``field``) or of a plain text file (one per non-empty line).

    Raises:
        UsageError: no such file, nothing in it, or a row without the field.
    """
    path = Path(path)
    if not path.is_file():
        raise UsageError("data", str(path), "no such file")
    texts: list[str] = []
    with path.open(encoding="utf-8", errors="replace") as file:
        for number, line in enumerate(file, 1):
            if len(texts) == samples:
                break
            if path.suffix in (".jsonl", ".json"):
                try:
                    row = json.loads(line)
                except ValueError as error:
                    raise UsageError("data", str(path), f"line {number} is not JSON ({error})") from None
                if not isinstance(row, dict) or not isinstance(row.get(field), str):
                    way_out = closest(field, row) if isinstance(row, dict) else "it is not a JSON object"
                    raise UsageError("field", field, f"line {number} of {path} has no such text; {way_out}")
                line = row[field]
            if line.strip():
                texts.append(line.strip())
    if not texts:
        raise UsageError("data", str(path), "there is no text in it")
    return texts


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
    from nemo_tiedlora.nemo.generate import generator

    with generator(base) as loaded:
        outputs = layer_outputs(loaded.model, texts, length)
        return similarity_matrix(progress(outputs, "calibrating", len(texts)), kind)


def checksum_of(path: str | Path) -> str:
    """SHA-256 of a file (hexadecimal)."""
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()
