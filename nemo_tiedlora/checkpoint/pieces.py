"""A distributed checkpoint (``torch_dist``): pieces of tensors in ``.distcp`` files, a list of them, and the rest."""

import io
from collections.abc import Iterator
from contextlib import contextmanager
from typing import IO, Any

from torch.distributed.checkpoint.metadata import BytesStorageMetadata, Metadata, MetadataIndex, TensorStorageMetadata

from nemo_tiedlora.checkpoint import pickles
from nemo_tiedlora.errors import UsageError
from nemo_tiedlora.model.archive import Files, Folder

#: The list of pieces, and what is no tensor, cannot be larger.
MOST_METADATA, MOST_OBJECT = 2**30, 2**26
#: Bytes that are read at a time.
CHUNK = 2**20
#: Formats of the rest could run code: zarr's have filters that unpickle.
BACKENDS = {"sharded_backend": "torch_dist", "common_backend": "torch"}


class Window(io.RawIOBase):
    """A part of a file, which is read without a second copy of it in memory, as large as it is."""

    def __init__(self, file: IO[bytes], start: int, length: int):
        self.file, self.start, self.length = file, start, length
        self.at = 0

    def readable(self) -> bool:
        return True

    def seekable(self) -> bool:
        return True

    def seek(self, offset: int, whence: int = io.SEEK_SET) -> int:
        at = offset + {io.SEEK_SET: 0, io.SEEK_CUR: self.at, io.SEEK_END: self.length}[whence]
        if at < 0:
            raise ValueError("before the beginning")
        self.at = at
        return at

    def readinto(self, buffer: Any) -> int:
        content = memoryview(buffer).cast("B")[: max(self.length - self.at, 0)]
        start = self.at
        self.file.seek(self.start + start)
        for begin in range(0, len(content), CHUNK):
            part = self.file.read(min(CHUNK, len(content) - begin))
            content[begin : begin + len(part)] = part
            self.at += len(part)
        return self.at - start


class Pieces:
    """An open distributed checkpoint.

    Args:
        files: where it is. folder: its name among them, with a slash; by default they are its own.

    Attributes:
        metadata: the list of its pieces.

    Raises:
        UsageError: the list is damaged, or names what could run code.
    """

    def __init__(self, files: Files, folder: str = ""):
        self.files, self.folder = files, folder
        self.metadata: Metadata = self._read(".metadata", pickles.PieceList.read)
        if not isinstance(self.metadata, Metadata) or not self._is_a_list():
            raise files.error(f"{folder}.metadata in it is not a list of a checkpoint's pieces")

    def bytes(self, index: MetadataIndex) -> bytes:
        """What is stored of one piece.

        Raises:
            UsageError: not all of it is there.
        """
        with self.open(index) as window:
            window.file.seek(window.start)
            return window.file.read(window.length)

    @contextmanager
    def open(self, index: MetadataIndex) -> Iterator["Window"]:
        """What is stored of one piece, as a file of its own.

        Raises:
            UsageError: not all of it is there.
        """
        info = self.metadata.storage_data[index]
        if getattr(info, "transform_descriptors", None):
            raise self.files.error(f"{index.fqn} is stored compressed, which this program does not read")
        name = f"{self.folder}{info.relative_path}"
        if name not in self.files.sizes:
            raise self.files.error(f"there is no {name} in it")
        if info.offset < 0 or not 0 <= info.length <= self.files.sizes[name] - info.offset:
            raise self.files.error(f"cut off: {name} in it ends before {index.fqn}")
        with self.files.open(name) as file:
            yield Window(file, info.offset, info.length)

    def check(self) -> None:
        """Look at everything that would be unpickled, and at the sizes of everything else.

        Raises:
            UsageError: it could run code, or is damaged.
        """
        backends = self._read("metadata.json", lambda file: pickles.read_json(file.read()))
        if not isinstance(backends, dict) or any(backends.get(name) != value for name, value in BACKENDS.items()):
            raise self.files.error(f"its metadata.json must say {BACKENDS}")
        for name in self.files.sizes:
            below = name.removeprefix(self.folder)
            if name.startswith(self.folder) and below not in (".metadata", "metadata.json"):
                if below == "common.pt":
                    self._read(below, pickles.load)
                elif not below.endswith(".distcp"):
                    raise self.files.error(f"{name} in it could run code: it is no part of a {BACKENDS} checkpoint")
        for index, info in self.metadata.storage_data.items():
            saved = self.metadata.state_dict_metadata[index.fqn]
            # Transformer Engine keeps a pickle as a tensor of bytes.
            if isinstance(saved, BytesStorageMetadata) or "_extra_state" in index.fqn:
                self._check_object(index, info.length)
            else:
                self._check_piece(index, info, saved)

    def _check_object(self, index: MetadataIndex, length: int) -> None:
        if length > MOST_OBJECT:
            raise self.files.error(f"{index.fqn} in it is larger than it can be: {length:,} bytes")
        try:
            pickles.check_extra_state(pickles.load(io.BytesIO(self.bytes(index))))
        except pickles.Refused as error:
            raise self.files.error(f"{index.fqn} in it: {error}") from None

    def _check_piece(self, index: MetadataIndex, info: Any, saved: TensorStorageMetadata) -> None:
        name = f"{self.folder}{info.relative_path}"
        numbers = [chunk.sizes.numel() for chunk in saved.chunks if chunk.offsets == index.offset]
        if not numbers or info.length < numbers[0] * saved.properties.dtype.itemsize:
            raise self.files.error(f"{index.fqn} in it is smaller than its shape")
        if info.offset < 0 or info.offset + info.length > self.files.sizes.get(name, 0):
            raise self.files.error(f"cut off: {name} in it ends before {index.fqn}")

    def _is_a_list(self) -> bool:
        storage, tensors = self.metadata.storage_data, self.metadata.state_dict_metadata
        if not isinstance(storage, dict) or not isinstance(tensors, dict):
            return False
        return all(
            isinstance(index, MetadataIndex)
            and isinstance(tensors.get(index.fqn), BytesStorageMetadata | TensorStorageMetadata)
            and type(getattr(info, "offset", None)) is type(getattr(info, "length", None)) is int
            and isinstance(getattr(info, "relative_path", None), str)
            for index, info in storage.items()
        )

    def _read(self, name: str, read: Any) -> Any:
        try:
            return read(io.BytesIO(self.files.read(f"{self.folder}{name}", MOST_METADATA)))
        except pickles.Refused as error:
            raise self.files.error(f"{self.folder}{name} in it: {error}") from None


def check_folder(folder: Folder) -> None:
    """Raise ``UsageError`` unless a folder is a distributed checkpoint that runs nothing when it is read."""
    try:
        Pieces(folder).check()
    except (*pickles.DAMAGED, StopIteration) as error:
        if isinstance(error, UsageError):
            raise
        raise folder.error(f"damaged ({type(error).__name__}: {error})") from None
