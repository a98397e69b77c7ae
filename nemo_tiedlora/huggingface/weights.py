"""Tensors of a saved model by name, from safetensors files, one at a time."""

from __future__ import annotations

import json
from contextlib import ExitStack
from pathlib import Path
from typing import TYPE_CHECKING, BinaryIO

from nemo_tiedlora.errors import UsageError
from nemo_tiedlora.huggingface.families import read_config
from nemo_tiedlora.model.config import MOST_BYTES

if TYPE_CHECKING:
    from torch import Tensor

SINGLE, INDEX = "model.safetensors", "model.safetensors.index.json"
#: Types that a model can be run in, as safetensors and torch call them.
DTYPES = {"F32": "float32", "F16": "float16", "BF16": "bfloat16"}


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
        self.folder, self.files = folder, weight_files(folder)
        self.shapes: dict[str, tuple[int, ...]] = {}
        self.dtypes: dict[str, str] = {}
        self._places: dict[str, tuple[Path, int]] = {}
        self._stack = ExitStack()
        self._opened: dict[Path, BinaryIO] = {}
        for path in self.files:
            self._note(path)
        if not any(name.startswith(f"{inner}.") for name in self.shapes):
            for facts in (self.shapes, self.dtypes, self._places):
                below = {f"{inner}.{name}": fact for name, fact in facts.items()}
                facts.clear()
                facts.update(below)

    def _note(self, path: Path) -> None:
        from safetensors import SafetensorError, safe_open

        try:
            with safe_open(path, "pt") as file, path.open("rb") as content:
                length = int.from_bytes(content.read(8), "little")
                header = json.loads(content.read(length))
                for name in file.keys():  # noqa: SIM118, it is no dictionary
                    if name in self.shapes:
                        raise UsageError("model", str(path), f"the tensor {name} is in another file too")
                    piece = file.get_slice(name)
                    self.shapes[name], self.dtypes[name] = tuple(piece.get_shape()), piece.get_dtype()
                    self._places[name] = path, 8 + length + header[name]["data_offsets"][0]
        except (SafetensorError, OSError) as error:
            raise UsageError("model", str(path), f"damaged or cut off ({error})") from None

    def __enter__(self) -> Weights:
        self._opened = {path: self._stack.enter_context(path.open("rb")) for path in self.files}
        return self

    def __exit__(self, *_: object) -> None:
        self._opened = {}
        self._stack.close()

    def read(self, name: str) -> Tensor:
        """One tensor.

        Raises:
            UsageError: it has NaN or infinity in it, or the file was cut off since.
        """
        import torch

        path, begin = self._places[name]
        tensor = torch.empty(self.shapes[name], dtype=getattr(torch, DTYPES[self.dtypes[name]]))
        content = memoryview(tensor.view(-1).view(torch.uint8).numpy())
        self._opened[path].seek(begin)
        # Not through safetensors: all that it ever mapped of the file would stay in memory.
        if self._opened[path].readinto(content) != len(content):
            raise UsageError("model", str(path), "cut off")
        if not all(end.isfinite() for end in tensor.aminmax()):  # which pass NaN on, and need no second tensor
            raise UsageError("model", str(self.folder), f"the tensor {name} has NaN or infinity in it")
        return tensor
