"""Tar files from strangers: read without unpacking them anywhere, and refused if a member could lead elsewhere."""

import tarfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path, PurePosixPath
from typing import IO

from nemo_tiedlora.errors import UsageError


class Archive:
    """The files of an open tar by name, without a leading ``./``.

    Args:
        tar: open for reading.
        path, field: where it is from, for messages.

    Raises:
        UsageError: a member with an absolute path or one to a parent folder, a link, a device, or a second member of
            one name.
    """

    def __init__(self, tar: tarfile.TarFile, path: Path, field: str):
        self.tar, self.path, self.field = tar, path, field
        self.members: dict[str, tarfile.TarInfo] = {}
        for member in tar:
            name = PurePosixPath(member.name)
            if name.is_absolute() or ".." in name.parts or "\\" in member.name:
                raise self.error(f"its member {member.name!r} leads out of the archive")
            if not (member.isfile() or member.isdir()):
                raise self.error(f"its member {member.name!r} is a link or a device")
            if member.isfile():
                if str(name) in self.members:
                    raise self.error(f"its member {member.name!r} is there twice")
                self.members[str(name)] = member

    def error(self, reason: str) -> UsageError:
        """What is wrong with the file."""
        return UsageError(self.field, str(self.path), reason)

    def open(self, name: str) -> IO[bytes]:
        """A member, to be read at any place."""
        return self.tar.extractfile(self.members[name])

    def read(self, name: str, most: int) -> bytes:
        """All of a member, if it is no longer than ``most`` bytes.

        Raises:
            UsageError: it is longer, not there or cut off.
        """
        if name not in self.members:
            raise self.error(f"there is no {name} in it")
        size = self.members[name].size
        if size > most:
            raise self.error(f"{name} in it is larger than it can be: {size:,} bytes instead of at most {most:,}")
        content = self.open(name).read()
        if len(content) != size:
            raise self.error(f"cut off: {name} in it ends after {len(content):,} of {size:,} bytes")
        return content


@contextmanager
def opened(path: Path, field: str) -> Iterator[Archive]:
    """The tar at ``path``.

    Raises:
        UsageError: not a file, not a readable tar, or one that ``Archive`` refuses.
    """
    if not path.is_file():
        raise UsageError(field, str(path), "no such file" if not path.exists() else "not a .nemo file")
    try:
        with tarfile.open(path) as tar:
            yield Archive(tar, path, field)
    except UsageError:
        raise
    except (tarfile.TarError, EOFError, OSError, ValueError) as error:
        if isinstance(error, OSError) and error.errno and error.filename not in (None, str(path)):
            raise  # not this file's fault
        raise UsageError(field, str(path), f"not a readable .nemo file ({type(error).__name__})") from None


def entry(name: str, size: int) -> tarfile.TarInfo:
    """A member's header that says nothing about when, where and by whom it was written."""
    member = tarfile.TarInfo(name)
    member.size, member.mode = size, 0o644
    return member
