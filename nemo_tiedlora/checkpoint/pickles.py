"""Reading files that Python's pickle wrote, without running anything that is in them.

A pickle is a program: it names functions and calls them. Here it may name only what plain data and tensors are made of;
a file that names anything else is refused before anything of it is done.
"""

import io
import json
import pickle
import struct
import warnings
import zipfile
from collections import OrderedDict, defaultdict
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from functools import cache
from importlib.util import find_spec
from pathlib import Path, PurePosixPath
from typing import IO, Any

import torch

from nemo_tiedlora.errors import UsageError
from nemo_tiedlora.files import sha256_of

#: torch's own function: the host replaces ``torch.load``.
torch_load = torch.load

#: What a torch file may name beside tensors and configs.
SAFE = (OrderedDict, defaultdict, io.BytesIO, dict, list, int, (Any, "typing.Any"))
#: What reading a damaged file ends in.
DAMAGED = (
    RuntimeError, EOFError, ValueError, KeyError, IndexError, AttributeError, TypeError, OverflowError, MemoryError,
    RecursionError, AssertionError, NotImplementedError, struct.error, zipfile.BadZipFile,
)  # fmt: skip


@cache
def _configs() -> tuple[type, ...]:
    """What the configs that NeMo keeps in its checkpoints are made of; nothing where there is no NeMo."""
    if not find_spec("omegaconf"):
        return ()
    from omegaconf import base, dictconfig, listconfig, nodes

    values = (nodes.AnyNode, nodes.BooleanNode, nodes.FloatNode, nodes.IntegerNode, nodes.StringNode)
    return (dictconfig.DictConfig, listconfig.ListConfig, *values, base.ContainerMetadata, base.Metadata)


class Refused(ValueError):
    """Why a file is not read, in one line."""


def load(
    file: str | Path | IO[bytes], map_location: Any = "cpu", mmap: bool = False, intact: bool = False, old: bool = False
) -> Any:
    """What ``torch.save`` wrote to ``file``: tensors, containers, numbers and text.

    Args:
        intact: also compare the checksums in it, which torch does not; reads all of it once more.
        old: also take torch's format of old, in which processes still send each other tensors.

    Raises:
        Refused: anything else is in it, or it is damaged.
    """
    try:
        if not (old and isinstance(file, io.BytesIO) and file.getbuffer()[:2] != b"PK"):
            _check_zip(file, intact)
        with torch.serialization.safe_globals([*SAFE, *_configs()]), warnings.catch_warnings(action="ignore"):
            return torch_load(file, map_location=map_location, weights_only=True, mmap=mmap or None)
    except pickle.UnpicklingError as error:
        raise Refused(_why(error)) from None
    except DAMAGED as error:
        if isinstance(error, Refused | torch.OutOfMemoryError):
            raise
        raise Refused(f"damaged or cut off ({type(error).__name__})") from None


def _check_zip(file: str | Path | IO[bytes], intact: bool) -> None:
    """A torch file is a zip archive whose members are stored as they are; one that would grow in memory is none."""
    start = file.tell() if hasattr(file, "tell") else 0
    with zipfile.ZipFile(file) as archive:
        members = archive.infolist()
        assert archive.fp is not None  # as it is once closed
        archive.fp.seek(0, io.SEEK_END)
        if any(one.compress_type != zipfile.ZIP_STORED for one in members):
            raise Refused("its content is compressed, which torch does not do")
        if sum(one.file_size for one in members) > archive.fp.tell():
            raise Refused("damaged: it declares more than there is in it")
        if intact and (damaged := archive.testzip()):
            raise Refused(f"damaged or cut off ({damaged})")
    if hasattr(file, "seek"):
        file.seek(start)


def _why(error: Exception) -> str:
    """The name that a pickle asks for, out of several lines of torch's."""
    for word, named in (("GLOBAL ", "GLOBAL "), ("class ", "class ")):
        if word in str(error):
            name = str(error).split(named, 1)[1].split()[0].strip("`'\".,")
            return f"it asks for {name}, which could run code"
    return "damaged, or not of torch"


class _Unpickler(pickle._Unpickler):  # the one in Python: in C, one instruction can claim all memory
    """A reader whose pickles name only what a class of this allows."""

    dispatch = {
        code: do
        for code, do in pickle._Unpickler.dispatch.items()
        if bytes([code]) not in (pickle.BYTEARRAY8, pickle.NEXT_BUFFER, pickle.READONLY_BUFFER, pickle.INST, pickle.OBJ)
        and bytes([code]) not in (pickle.EXT1, pickle.EXT2, pickle.EXT4, pickle.PERSID, pickle.BINPERSID)
    }

    def find_class(self, module: str, name: str) -> Any:
        raise pickle.UnpicklingError(f"it asks for {module}.{name}, which could run code")

    @classmethod
    def read(cls, file: IO[bytes]) -> Any:
        """What is in ``file``.

        Raises:
            Refused: it is damaged, or names what it may not.
        """
        try:
            return cls(file).load()
        except pickle.UnpicklingError as error:
            raise Refused(str(error)) from None
        except DAMAGED as error:
            raise Refused(f"damaged or cut off ({type(error).__name__})") from None


class Plain(_Unpickler):
    """Reads containers, numbers and text, and nothing that has a name."""


class PieceList(_Unpickler):
    """Reads the list of a distributed checkpoint's pieces (``.metadata``), and makes nothing but such lists."""

    OWN = ("torch.distributed.checkpoint.metadata", "torch.distributed.checkpoint.planner")
    SAFE = {
        ("torch.distributed.checkpoint.filesystem", "_StorageInfo"),
        ("torch.serialization", "_get_layout"),
        ("collections", "OrderedDict"),
        ("torch", "Size"),
    }
    VALUES = (torch.dtype, torch.layout, torch.memory_format)

    def find_class(self, module: str, name: str) -> Any:
        if module.startswith("megatron.core.dist_checkpointing.") and name == "MCoreSavePlan":
            return _Plan
        if module in ("pathlib", "pathlib._local") and name in ("PosixPath", "PurePosixPath"):
            return PurePosixPath
        if module == "torch" and isinstance(vars(torch).get(name), self.VALUES):
            return vars(torch)[name]
        if module in self.OWN or (module, name) in self.SAFE:
            found = vars(__import__(module, fromlist=[name])).get(name)
            if (module, name) in self.SAFE or (isinstance(found, type) and found.__module__ == module):
                return found
        return super().find_class(module, name)


class _Plan:
    """How the ranks that saved the checkpoint shared the work: of no use to anyone else."""


def check_extra_state(value: Any) -> None:
    """Raise ``Refused`` if what a layer keeps beside its weights could run code: Transformer Engine unpickles it."""
    if isinstance(value, list | tuple):
        for item in value:
            check_extra_state(item)
    elif isinstance(value, io.BytesIO):
        if value.getbuffer().nbytes:
            check_extra_state(load(io.BytesIO(value.getvalue())))
    elif isinstance(value, torch.Tensor) and value.dtype == torch.uint8 and value.numel():
        Plain.read(io.BytesIO(value.cpu().numpy().tobytes()))


def read_json(content: bytes) -> Any:
    """JSON, however it is damaged or nested.

    Raises:
        Refused: it is not JSON.
    """
    try:
        return json.loads(content)
    except (ValueError, RecursionError):
        raise Refused("not JSON") from None


_trusted: frozenset[str] = frozenset()
_off = 0


@contextmanager
def trusting(digests: Iterable[str]) -> Iterator[None]:
    """Within this, files of these SHA-256 (hexadecimal) are read as NeMo reads them, whatever they do."""
    global _trusted
    before, _trusted = _trusted, frozenset(digests)
    try:
        yield
    finally:
        _trusted = before


def is_trusted(path: str | Path) -> bool:
    """Whether the file at ``path`` is one that the user named by its SHA-256."""
    return bool(_trusted) and Path(path).is_file() and sha256_of(Path(path)) in _trusted


@contextmanager
def as_it_is(path: str | Path) -> Iterator[None]:
    """Within this, whatever is read is read as NeMo reads it, if ``path`` is a trusted file."""
    global _off
    off = is_trusted(path)
    _off += off
    try:
        yield
    finally:
        _off -= off


def guarded() -> bool:
    """Whether reading is restricted: always, but within ``as_it_is``."""
    return not _off


def refusal(file: Any, reason: Any) -> UsageError:
    """The error for a file that is being read by its path, or is open."""
    path = file if isinstance(file, str | Path) else getattr(file, "name", "?")
    return UsageError("file", str(path), str(reason))


def with_digest(error: UsageError, path: Path) -> UsageError:
    """The error, with how to read the file all the same, if that is what it would take."""
    if "could run code" not in error.way_out:
        return error
    way_out = f"{error.way_out}; if you trust it, give trust_sha256={sha256_of(path)} on the command line"
    return UsageError(error.field, error.value, way_out)


def check_digests(given: Any, field: str) -> list[str]:
    """One SHA-256 or several, as a list of lower-case hexadecimal ones.

    Raises:
        UsageError: something else.
    """
    digests = [given] if isinstance(given, str) else list(given or ())
    for digest in digests:
        if not isinstance(digest, str) or len(digest) != 64 or not set(digest.lower()) <= set("0123456789abcdef"):
            raise UsageError(field, digest, "write the file's SHA-256, 64 hexadecimal digits, as sha256sum prints it")
    return [digest.lower() for digest in digests]
