"""A GGUF file: its settings and its tensors, read so that a damaged one costs neither memory nor time."""

from __future__ import annotations

import math
import struct
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

from nemo_tiedlora.errors import UsageError

if TYPE_CHECKING:
    from torch import Tensor

MAGIC = b"GGUF"
VERSIONS = (2, 3)
#: More than the part before the tensors is in any file; a vocabulary takes most of it.
MOST_SETTINGS = 2**28
#: More than any model has.
MOST_TENSORS, MOST_AXES = 2**20, 4
#: By the numbers that the format gives them.
NUMBERS = {0: "B", 1: "b", 2: "H", 3: "h", 4: "I", 5: "i", 6: "f", 7: "?", 10: "Q", 11: "q", 12: "d"}
TEXT, ARRAY = 8, 9
#: Types of tensors that are not quantised: numpy's names.
PLAIN = {0: "<f4", 1: "<f2", 30: "<u2"}
BF16 = 30


def is_gguf(path: Path) -> bool:
    """Whether a file says that it is one, by its name or its first bytes."""
    if not path.is_file():
        return False
    with path.open("rb") as file:
        return path.suffix == ".gguf" or file.read(len(MAGIC)) == MAGIC


class Stored(NamedTuple):
    """Where a tensor is. Its shape is as in torch, the longest steps first; ``kind`` is the format's number."""

    shape: tuple[int, ...]
    kind: int
    start: int
    size: int


class GgufFile:
    """A GGUF file.

    Attributes:
        values: its settings by name, such as ``llama.block_count``.
        tensors: by name, such as ``blk.0.attn_q.weight``; all of them are in the file.

    Raises:
        UsageError: it is damaged or cut off, or quantised in a way that cannot be read here.
    """

    def __init__(self, path: Path, field: str = "model"):
        self.path, self.field = path, field
        self.values: dict[str, Any] = {}
        self.tensors: dict[str, Stored] = {}
        try:
            with path.open("rb") as file:
                self.content = file.read(MOST_SETTINGS)
            self.at, self.length = 0, path.stat().st_size
            self._read()
        except OSError as error:
            raise self.error(f"cannot be read ({error.strerror})") from None
        except (struct.error, UnicodeDecodeError, ValueError) as error:
            if isinstance(error, UsageError):
                raise
            raise self.error(f"damaged or cut off ({error})") from None
        del self.content

    def error(self, reason: str) -> UsageError:
        """What is wrong with the file."""
        return UsageError(self.field, str(self.path), reason)

    def _read(self) -> None:
        if self._take("4s") != MAGIC:
            raise self.error("not a GGUF file")
        version = self._take("I")
        if version not in VERSIONS:
            raise self.error(f"a GGUF file of version {version}; what can be read: {', '.join(map(str, VERSIONS))}")
        tensors, values = self._take("Q"), self._take("Q")
        for _ in range(min(values, len(self.content))):  # each takes a byte at least
            name = self._text()
            self.values[name] = self._value(self._take("I"))
        if tensors > MOST_TENSORS:
            raise ValueError(f"{tensors:,} tensors")
        found = [self._described() for _ in range(tensors)]
        alignment = self.values.get("general.alignment", 32)
        if type(alignment) is not int or not 1 <= alignment <= 2**20:
            raise ValueError(f"general.alignment is {alignment!r}")
        start = math.ceil(self.at / alignment) * alignment
        for name, shape, kind, offset in found:
            if name in self.tensors:
                raise ValueError(f"the tensor {name} is in it twice")
            size = math.prod(self._bytes_shape(name, shape, kind))
            if start + offset + size > self.length:
                raise ValueError(f"the tensor {name} ends behind the file's end")
            self.tensors[name] = Stored(shape, kind, start + offset, size)

    def _take(self, form: str) -> Any:
        (value,) = struct.unpack_from(f"<{form}", self.content, self.at)
        self.at += struct.calcsize(f"<{form}")
        return value

    def _text(self) -> str:
        length = self._take("Q")
        if length > len(self.content) - self.at:
            raise ValueError("a text ends behind the file's end")
        self.at += length
        return self.content[self.at - length : self.at].decode("utf-8")

    def _value(self, kind: int) -> Any:
        if kind in NUMBERS:
            return self._take(NUMBERS[kind])
        if kind == TEXT:
            return self._text()
        if kind != ARRAY:
            raise ValueError(f"a setting of type {kind}")
        kind, count = self._take("I"), self._take("Q")
        if kind not in (TEXT, *NUMBERS):  # of arrays there are none
            raise ValueError(f"a list of type {kind}")
        if count * struct.calcsize(f"<{NUMBERS.get(kind, 'Q')}") > len(self.content) - self.at:
            raise ValueError("a list ends behind the file's end")
        return [self._value(kind) for _ in range(count)]

    def _described(self) -> tuple[str, tuple[int, ...], int, int]:
        name, axes = self._text(), self._take("I")
        if not 1 <= axes <= MOST_AXES:
            raise ValueError(f"the tensor {name} has {axes} axes")
        shape = tuple(self._take("Q") for _ in range(axes))[::-1]
        if not all(shape):
            raise ValueError(f"the tensor {name} has shape {shape}")
        return name, shape, self._take("I"), self._take("Q")

    def _bytes_shape(self, name: str, shape: tuple[int, ...], kind: int) -> tuple[int, ...]:
        if kind in PLAIN:
            return *shape[:-1], shape[-1] * int(PLAIN[kind][-1])
        gguf = self._quantisation(name, kind)
        try:
            return gguf.quants.quant_shape_to_byte_shape(shape, gguf.GGMLQuantizationType(kind))
        except (ValueError, KeyError):
            raise ValueError(f"the tensor {name} has shape {shape}, and type {kind}") from None

    def _quantisation(self, name: str, kind: int) -> Any:
        try:
            import gguf
            import gguf.quants
        except ImportError:
            way_out = f"its tensor {name} is quantised (type {kind}); reading it takes a package that is not installed"
            raise self.error(f"{way_out}: pip install gguf") from None
        return gguf

    def read(self, name: str) -> Tensor:
        """One tensor; what is quantised becomes float32, everything else stays in its type.

        Raises:
            UsageError: quantised in a way that the gguf package cannot undo.
        """
        import numpy
        import torch

        stored = self.tensors[name]
        shape = self._bytes_shape(name, stored.shape, stored.kind)
        content = numpy.fromfile(self.path, numpy.uint8, stored.size, offset=stored.start).reshape(shape)
        if stored.kind in PLAIN:
            tensor = torch.from_numpy(content.view(PLAIN[stored.kind]).astype(PLAIN[stored.kind].lstrip("<")))
            return tensor.view(torch.bfloat16) if stored.kind == BF16 else tensor
        gguf = self._quantisation(name, stored.kind)
        kind = gguf.GGMLQuantizationType(stored.kind)
        try:
            with numpy.errstate(all="ignore"):  # of damaged scales; the caller looks for what is not finite
                return torch.from_numpy(gguf.quants.dequantize(content, kind))
        except NotImplementedError:
            raise self.error(f"its tensor {name} is of type {kind.name}, which the gguf package cannot read") from None
