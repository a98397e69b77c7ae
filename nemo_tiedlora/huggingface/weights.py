"""Tensors of a saved model by name, from safetensors files, one at a time."""

from __future__ import annotations

from contextlib import ExitStack
from pathlib import Path
from typing import TYPE_CHECKING, Any

from nemo_tiedlora.errors import UsageError
from nemo_tiedlora.huggingface.families import read_config
from nemo_tiedlora.model.config import MOST_BYTES

if TYPE_CHECKING:
    from torch import Tensor

SINGLE, INDEX = "model.safetensors", "model.safetensors.index.json"
#: Types that a model can be run in.
DTYPES = ("F32", "F16", "BF16")


def weight_files(folder: Path) -> list[Path]:
    """The files that have a model's tensors.

    Raises:
        UsageError: there are none, or one that the index names is not there.
    """
    if (folder / SINGLE).is_file():
        return [folder / SINGLE]
    if not (folder / INDEX).is_file():
        way_out = f"there is neither {SINGLE} nor {INDEX} in it"
        if any(folder.glob("*.bin")):
            way_out += "; what is there is pickled, which could run code: if you trust it, load it with transformers "
            way_out += "and save it with save_pretrained(..., safe_serialization=True)"
        raise UsageError("model", str(folder), way_out)
    listed = read_config(folder, INDEX, most=16 * MOST_BYTES).get("weight_map")
    if not isinstance(listed, dict) or not listed or not all(isinstance(name, str) for name in listed.values()):
        raise UsageError("model", str(folder / INDEX), "its weight_map does not say which file has which tensor")
    files = []
    for name in sorted(set(listed.values())):
        if Path(name).name != name or not name.endswith(".safetensors"):
            raise UsageError("model", str(folder / INDEX), f"its weight_map names {name!r}, no file beside it")
        if not (folder / name).is_file():
            raise UsageError("model", str(folder), f"there is no {name} in it, which {INDEX} names")
        files.append(folder / name)
    return files


class Weights:
    """A model's tensors, to be read inside a ``with`` block.

    Args:
        folder: of the model.
        inner: what the names of all tensors begin with, but for the last layer's. Where none does, the inner model was
            saved alone, as GPT-2 was: they get it.

    Attributes:
        shapes: of every tensor, by name. dtypes: as safetensors names them.

    Raises:
        UsageError: a file is missing, damaged or cut off, or a tensor is there twice.
    """

    def __init__(self, folder: Path, inner: str):
        self.folder, self.files, self.inner = folder, weight_files(folder), f"{inner}."
        self.shapes: dict[str, tuple[int, ...]] = {}
        self.dtypes: dict[str, str] = {}
        self._stack = ExitStack()
        self._of: dict[str, tuple[Any, str]] = {}
        with self as opened:
            for name, (file, stored) in opened._of.items():
                piece = file.get_slice(stored)
                self.shapes[name], self.dtypes[name] = tuple(piece.get_shape()), piece.get_dtype()

    def __enter__(self) -> Weights:
        from safetensors import SafetensorError, safe_open

        found: dict[str, Any] = {}
        for path in self.files:
            try:
                file = self._stack.enter_context(safe_open(path, "pt"))
                names = list(file.keys())
            except (SafetensorError, OSError) as error:
                self._stack.close()
                raise UsageError("model", str(path), f"damaged or cut off ({error})") from None
            for name in names:
                if name in found:
                    self._stack.close()
                    raise UsageError("model", str(path), f"the tensor {name} is in another file too")
                found[name] = file
        alone = not any(name.startswith(self.inner) for name in found)
        self._of = {f"{self.inner}{name}" if alone else name: (file, name) for name, file in found.items()}
        return self

    def __exit__(self, *_: object) -> None:
        self._of = {}
        self._stack.close()

    def read(self, name: str) -> Tensor:
        """One tensor.

        Raises:
            UsageError: it has NaN or infinity in it.
        """
        file, stored = self._of[name]
        tensor = file.get_tensor(stored)
        if not all(end.isfinite() for end in tensor.aminmax()):  # which pass NaN on, and need no second tensor
            raise UsageError("model", str(self.folder), f"the tensor {name} has NaN or infinity in it")
        return tensor
