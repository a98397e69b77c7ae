"""Tar files and folders from strangers: read without unpacking them anywhere, and refused if a member could lead
elsewhere, declares more than there is, or is damaged."""

import io
import re
import stat
import tarfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path, PurePosixPath
from typing import IO, cast

from nemo_tiedlora.errors import UsageError
from nemo_tiedlora.files import FULL

#: Names longer than a tar's header holds, and what else is said of a member, come before it; they cannot be larger.
MOST_EXTRA = 2**16
PLAIN = (tarfile.REGTYPE, tarfile.AREGTYPE)


class Files:
    """Files by name, of a tar or below a folder; the names without a leading ``./``.

    Args:
        path, field: where they are from, for messages.
    """

    def __init__(self, path: Path, field: str):
        self.path, self.field = path, field
        self.sizes: dict[str, int] = {}

    def error(self, reason: str) -> UsageError:
        """What is wrong with the file."""
        return UsageError(self.field, str(self.path), reason)

    def open(self, name: str) -> IO[bytes]:
        """A file, to be read at any place."""
        raise NotImplementedError

    def read(self, name: str, most: int) -> bytes:
        """All of a file, if it is no longer than ``most`` bytes.

        Raises:
            UsageError: it is longer, not there or cut off.
        """
        if name not in self.sizes:
            raise self.error(f"there is no {name} in it")
        size = self.sizes[name]
        if size > most:
            raise self.error(f"{name} in it is larger than it can be: {size:,} bytes instead of at most {most:,}")
        with self.open(name) as file:
            content = file.read()
        if len(content) != size:
            raise self.error(f"cut off: {name} in it ends after {len(content):,} of {size:,} bytes")
        return content


class Folder(Files):
    """The files in one folder, without those in folders below it."""

    def __init__(self, path: Path, field: str):
        super().__init__(path, field)
        self.sizes = {file.name: file.stat().st_size for file in path.iterdir() if stat.S_ISREG(file.stat().st_mode)}

    def open(self, name: str) -> IO[bytes]:
        return (self.path / name).open("rb")


class Archive(Files):
    """The files of an open tar.

    Args:
        tar: open for reading, and gone through.

    Raises:
        UsageError: a member with an absolute path or one to a parent folder, a link, a device, or a second member of
            one name.
    """

    def __init__(self, tar: tarfile.TarFile, path: Path, field: str):
        super().__init__(path, field)
        self.tar = tar
        self.members: dict[str, tarfile.TarInfo] = {}
        for member in tar:
            name = PurePosixPath(member.name)
            if name.is_absolute() or ".." in name.parts or "\\" in member.name or not member.name.isprintable():
                raise self.error(f"its member {member.name!r} leads out of the archive")
            if not (member.isfile() or member.isdir()) or member.issparse():
                raise self.error(f"its member {member.name!r} is a link or a device")
            if member.isfile():
                if str(name) in self.members:
                    raise self.error(f"its member {member.name!r} is there twice")
                self.members[str(name)] = member
        for path_inside in self.members:
            if any(str(parent) in self.members for parent in PurePosixPath(path_inside).parents):
                raise self.error(f"its member {path_inside!r} is below another file")
        self.sizes = {name: member.size for name, member in self.members.items()}

    def open(self, name: str) -> IO[bytes]:
        file = self.tar.extractfile(self.members[name])
        assert file is not None  # as it is for folders, which are not among the members
        return file


@contextmanager
def opened(path: Path, field: str) -> Iterator[Archive]:
    """The tar at ``path``.

    Raises:
        UsageError: not a file, not a readable tar, or one that ``Archive`` refuses.
    """
    if not path.is_file():
        raise UsageError(field, str(path), "no such file" if not path.exists() else "not a .nemo file")
    try:
        with path.open("rb") as file:
            found = list(_members(file))
        with tarfile.open(path, "r:") as tar:
            if [(member.offset_data, member.size) for member in tar] != found:
                raise ValueError("its headers can be read in two ways")
            yield Archive(tar, path, field)
    except UsageError:
        raise
    except (tarfile.TarError, EOFError, OSError, ValueError) as error:
        if isinstance(error, OSError) and (error.errno in FULL or error.filename not in (None, str(path))):
            raise  # not this file's fault
        reason = str(error) if type(error) is ValueError else type(error).__name__
        raise UsageError(field, str(path), f"not a readable .nemo file: {reason}") from None


def _members(file: IO[bytes]) -> Iterator[tuple[int, int]]:
    """Where the content of every member begins, and its size.

    ``tarfile`` takes a damaged header for the end, reads as much as a header declares, and can go round in circles:
    what it is to read is gone through here first.

    Raises:
        ValueError: the archive is damaged or cut off, or holds what no program here writes.
    """
    total = file.seek(0, io.SEEK_END)
    offset, declared = 0, None
    while True:
        file.seek(offset)
        block = file.read(tarfile.BLOCKSIZE)
        if len(block) < tarfile.BLOCKSIZE:
            raise ValueError("it is cut off")
        if not any(block):
            return
        if block[:2] == b"\x1f\x8b" and not offset:
            raise ValueError("it is compressed; unpack it first: gunzip < FILE > NEW.nemo")
        try:
            member = tarfile.TarInfo.frombuf(block, "utf-8", "surrogateescape")
        except tarfile.HeaderError:
            raise ValueError("not a tar archive" if not offset else "it is damaged") from None
        begin = offset + tarfile.BLOCKSIZE
        extra = member.type in (tarfile.XHDTYPE, tarfile.GNUTYPE_LONGNAME)
        size = member.size if extra or declared is None else declared
        if size < 0 or begin + size > total:
            raise ValueError(f"it is cut off: {member.name!r} in it would have {size:,} bytes")
        if extra:
            if size > MOST_EXTRA:
                raise ValueError(f"what it says of a member takes {size:,} bytes")
            if member.type == tarfile.XHDTYPE:
                declared = _declared(file.read(size))
        elif member.type in PLAIN or member.isdir():
            yield begin, size
            declared = None
        else:
            raise ValueError(f"its member {member.name!r} is a link or a device")
        offset = begin + -(-size // tarfile.BLOCKSIZE) * tarfile.BLOCKSIZE if not member.isdir() else begin


def _declared(records: bytes) -> int | None:
    """The size in an extended header, where it says one."""
    size = None
    while records.strip(b"\0"):
        record = re.match(rb"(\d{1,6}) ([^=]+)=", records)
        length = int(record[1]) if record else 0
        if not record or length <= record.end() or length > len(records) or records[length - 1 : length] != b"\n":
            raise ValueError("it is damaged")
        key, value = record[2], records[record.end() : length - 1]
        if key.startswith(b"GNU.sparse") or key in (b"linkpath", b"hdrcharset"):
            raise ValueError(f"its headers use {key.decode('ascii', 'replace')}")
        if key == b"size":
            if not re.fullmatch(rb"\d{1,18}", value):
                raise ValueError("it is damaged")
            size = int(value)
        records = records[length:]
    return size


def entry(name: str, size: int) -> tarfile.TarInfo:
    """A member's header that says nothing about when, where and by whom it was written."""
    member = tarfile.TarInfo(name)
    member.size, member.mode = size, 0o644
    return member


@contextmanager
def growing(tar: tarfile.TarFile, name: str) -> Iterator[IO[bytes]]:
    """A new member, to be written piece by piece: its size goes into its header at the end."""
    file, start = cast(IO[bytes], tar.fileobj), tar.offset  # by path, ``tarfile`` opens an ordinary file
    file.write(bytes(tarfile.BLOCKSIZE))
    yield file
    size = file.tell() - start - tarfile.BLOCKSIZE
    file.write(bytes(-size % tarfile.BLOCKSIZE))
    tar.offset = file.tell()
    header = entry(name, size).tobuf(tarfile.GNU_FORMAT)
    file.seek(start)
    file.write(header)
    file.seek(tar.offset)


class Appended:
    """The rest of a file as a file of its own, for ``torch.save``."""

    def __init__(self, file: IO[bytes]):
        self.write, self.flush = file.write, file.flush
