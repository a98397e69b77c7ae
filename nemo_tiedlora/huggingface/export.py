"""The way out: an adapter for engines and libraries that know plain LoRA."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from nemo_tiedlora.errors import UsageError, check_choice
from nemo_tiedlora.files import check_not_among, check_output, new_folder

FORMATS = ("peft-lora", "peft-vera", "nemo-lora", "gguf-lora")
DTYPES = ("float32", "bfloat16", "float16")
#: Formats that are one file, and how its name must end.
ENDINGS = {"nemo-lora": ".nemo", "gguf-lora": ".gguf"}


def export(
    adapter: Path, base: str | Path, form: str, out: Path, dtype: str, base_name: str | None, force: bool
) -> dict[str, Any]:
    """Write an adapter in another form, which computes the same.

    Args:
        adapter: in the canonical form.
        base: what it was trained on, as ``base_at`` takes it; taken over once the adapter is known to fit it.
        form: one of ``FORMATS``.
        out: a folder, which is new or empty; for ``nemo-lora`` and ``gguf-lora`` a file.
        dtype: of the tensors, one of ``DTYPES``.
        base_name: what PEFT is told of the model's name.
        force: also for a base with other weights, if its shape is the same.

    Returns:
        What was done, with the sizes before and after in bytes.

    Raises:
        UsageError: another base, an adapter or a base that the format has no words for, or values too large for the
            dtype.
    """
    check_choice("format", form, FORMATS)
    check_choice("dtype", dtype, DTYPES)
    if form in ENDINGS and out.suffix != ENDINGS[form]:
        raise UsageError("out", str(out), f"must end in {ENDINGS[form]} for {form}")
    check_not_among(out, base, adapter)
    check_output(out.parent, "out")
    import torch

    from nemo_tiedlora.checkpoint import read, stock_lora
    from nemo_tiedlora.checkpoint.base import open_base
    from nemo_tiedlora.checkpoint.merge import check_trained_on, said_of
    from nemo_tiedlora.checkpoint.plain_lora import PlainLora
    from nemo_tiedlora.huggingface import gguf_lora, peft_lora, peft_vera
    from nemo_tiedlora.huggingface.bases import find
    from nemo_tiedlora.huggingface.families import family_of
    from nemo_tiedlora.huggingface.given_back import hf_config
    from nemo_tiedlora.model.config import check_shape

    found, type_ = find(base), getattr(torch, dtype)
    loaded = read(adapter)
    check_shape(loaded.shape, found.config, "adapter", adapter)
    with open_base(found.file()) as source:
        checksums = check_trained_on(loaded, adapter, source, force)
        lora = PlainLora(loaded, source)
        if form == "nemo-lora":
            facts = stock_lora.write(lora, source, out, type_)
        elif form == "gguf-lora":
            facts = gguf_lora.write(lora, family_of(hf_config(source.config)), out, type_)
        else:
            write = {"peft-lora": peft_lora.write, "peft-vera": peft_vera.write}[form]
            modules = family_of(hf_config(source.config)).modules
            with new_folder(out, "out") as folder:
                facts = write(lora, modules, folder, type_, base_name)
    return {
        "file": str(out),
        "format": form,
        "scheme": loaded.scheme,
        **facts,
        "base_checksum": said_of(checksums, loaded),
        "bytes": size_of(out),
        "adapter_bytes": size_of(adapter),
    }


def size_of(path: Path) -> int:
    """Of a file, or of all files in a folder."""
    return sum(file.stat().st_size for file in (path.iterdir() if path.is_dir() else [path]))
