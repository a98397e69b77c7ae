"""The page that the Hugging Face Hub shows of an adapter's folder: ``README.md``, with its numbers filled in."""

from __future__ import annotations

import json
import re
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from nemo_tiedlora.checkpoint.store import TENSORS
from nemo_tiedlora.files import write_text
from nemo_tiedlora.variants import count

if TYPE_CHECKING:
    from torch import nn

    from nemo_tiedlora.checkpoint import Adapter
    from nemo_tiedlora.huggingface.heads import Heads

FILE = "README.md"
#: A page with this line is written again with the adapter; any other is its owner's.
MARK = "<!-- Written with the adapter. Without this line, your own text stays. -->"
#: Instead of a name.
UNKNOWN = "the model that it was trained on"
#: What the Hub calls a model: never a path on somebody's machine.
HUB_NAME = re.compile(r"[\w.-]+/[\w.-]+")


def name_of(model: nn.Module, said: str | None) -> str | None:
    """What to call the model that an adapter is for: what is said, or where it was loaded from on the Hub."""
    found = str(getattr(model.config, "_name_or_path", ""))
    return said or (found if HUB_NAME.fullmatch(found) and not Path(found).exists() else None)


def write(folder: Path, adapter: Adapter, sha256: str, model: nn.Module, said: str | None, heads: Heads) -> None:
    """Write the page of an adapter in the canonical form, unless its owner has written one.

    Args:
        folder: with the adapter's files in it.
        sha256: the adapter's.
        model: that it is on. said: see ``name_of``.
    """
    base = name_of(model, said)
    whole = sum(parameter.numel() for parameter in heads.parameters())
    rows = {
        **_method(adapter),
        "Trained parameters": f"{count(adapter.variant, adapter.sites).trainable:,}",
        "Trained whole": f"{', '.join(heads.names)}: {whole:,} parameters" if heads.names else None,
        "Numbers in the file": f"{sum(tensor.numel() for tensor in adapter.tensors.values()):,}",
        "Bytes": f"{(folder / TENSORS).stat().st_size:,} (`{TENSORS}`)",
        "SHA-256 of the adapter": f"`{sha256}`",
        **_base(adapter),
    }
    code = [
        "import transformers",
        "from nemo_tiedlora import huggingface",
        "",
        f"model = transformers.{type(model).__name__}.from_pretrained({json.dumps(base or UNKNOWN)})",
        'adapter = huggingface.load(model, "this folder")',
    ]
    _write(folder, adapter, base, "nemo_tiedlora", rows, code)


def write_exported(folder: Path, adapter: Adapter, base: str | None, facts: dict[str, Any]) -> None:
    """Write the page of what ``export_peft`` makes.

    Args:
        facts: what the export says of itself.
    """
    rows = {
        **_method(adapter),
        "Trained parameters": f"{count(adapter.variant, adapter.sites).trainable:,}",
        "Here, as plain LoRA": f"{facts['parameters']:,} numbers, rank {facts['rank']}, {facts['modules']} modules",
        "Bytes": f"{(folder / TENSORS).stat().st_size:,} (`{TENSORS}`)",
        **_base(adapter),
    }
    code = [
        "import peft, transformers",
        "",
        f"model = transformers.AutoModelForCausalLM.from_pretrained({json.dumps(base or UNKNOWN)})",
        'model = peft.PeftModel.from_pretrained(model, "this folder")',
    ]
    _write(folder, adapter, base, "peft", rows, code)


def _method(adapter: Adapter) -> dict[str, str | None]:
    config, variant = adapter.config, adapter.variant
    preset = getattr(config, "preset", None)
    parts = [adapter.scheme, f"preset {preset}" if preset else "", "DoRA" if config.dora else ""]
    layers = sorted({site.layer + 1 for site in adapter.sites})
    return {
        "Method": ", ".join(filter(None, parts)),
        "Rank": f"{variant.rank}; the change is multiplied by {variant.scale:g}",
        "Targets": ", ".join(f"`{target}`" for target in dict.fromkeys(site.target for site in adapter.sites)),
        "Layers": f"{len(layers)} of {adapter.base.shape['num_layers']}",
        "Seed": str(config.seed),
    }


def _base(adapter: Adapter) -> dict[str, str]:
    sums = adapter.base.checksums
    return {f"SHA-256 of the model's `{path}`": f"`{sums[path]}`" for path in sorted(sums)}


def _write(
    folder: Path, adapter: Adapter, base: str | None, library: str, rows: dict[str, str | None], code: Sequence[str]
) -> None:
    path = folder / FILE
    if path.exists() and MARK not in path.read_text(encoding="utf-8", errors="replace"):
        return
    tags = dict.fromkeys((library, "nemo_tiedlora", adapter.scheme, "lora", "parameter-efficient fine-tuning"))
    front = [f"library_name: {library}", f"tags: {json.dumps(list(tags))}"]
    front += [f"base_model: {json.dumps(base)}", "base_model_relation: adapter"] if base else []
    versions = ", ".join(f"{name} {version}" for name, version in adapter.versions.items())
    lines = [
        "---", *front, "---", MARK, "",
        f"# An adapter{f' of {base}' if base else ''}", "",
        f"Trained with nemo_tiedlora's `{adapter.scheme}` ({versions}).", "",
        "| | |", "|---|---|", *(f"| {name} | {value} |" for name, value in rows.items() if value), "",
        "## Loading it", "", "```python", *code, "```", "",
    ]  # fmt: skip
    write_text(path, "\n".join(lines))
