"""Writing files so that a crash never leaves half of one."""

import errno
import hashlib
import os
import shutil
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from uuid import uuid4

from nemo_tiedlora.errors import UsageError

#: What the system says when a disk, a quota or a file-size limit is full.
FULL = {errno.ENOSPC, errno.EDQUOT, errno.EFBIG}
#: Bytes of a file that takes a noticeable time to read through.
LARGE = 2**28
#: A run writes checkpoints, logs and the adapter; less free disk than this is not worth starting with.
MINIMUM_FREE_BYTES = 64 * 2**20


@contextmanager
def replacing(path: Path) -> Iterator[Path]:
    """Yield a temporary name beside ``path`` to write to; it takes ``path``'s place only if the block succeeds.

    What ``path`` names is on disk before this returns, so that a power cut leaves the old file or the new one.

    Raises:
        UsageError: the disk is full; the old file is as it was.
    """
    unfinished = path.with_name(f".{path.name}.{uuid4().hex}")  # processes of several machines may write here
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        yield unfinished
        move(unfinished, path)
    except (OSError, RuntimeError) as error:  # torch's writer turns the one into the other
        if _is_full(error):
            raise UsageError("file", str(path), "no disk space to write it; nothing was changed") from None
        raise
    finally:
        unfinished.unlink(missing_ok=True)


@contextmanager
def new_folder(path: Path, field: str) -> Iterator[Path]:
    """Yield a temporary folder beside ``path`` to fill; it becomes ``path`` only if the block succeeds.

    Raises:
        UsageError: there is something at ``path``, other than an empty folder; the disk is full.
    """
    if path.exists() and (not path.is_dir() or any(path.iterdir())):
        raise UsageError(field, str(path), "there is something there already; name a folder that is new or empty")
    unfinished = path.with_name(f".{path.name}.{uuid4().hex}")
    try:
        unfinished.mkdir(parents=True)
        yield unfinished
        for written in unfinished.iterdir():
            _flush(written)
        os.replace(unfinished, path)
        _flush(path.parent)
    except OSError as error:
        if _is_full(error):
            raise UsageError(field, str(path), "no disk space to write it; nothing was changed") from None
        raise
    finally:
        shutil.rmtree(unfinished, ignore_errors=True)


def move(finished: Path, path: Path) -> None:
    """Let ``finished`` take ``path``'s place in the same folder, once all of it is on disk."""
    _flush(finished)
    os.replace(finished, path)
    _flush(path.parent)


def write_text(path: Path, text: str) -> None:
    """Write ``text`` to ``path`` in one step, as UTF-8."""
    write_bytes(path, text.encode("utf-8"))


def write_bytes(path: Path, content: bytes) -> None:
    """Write ``content`` to ``path`` in one step."""
    with replacing(path) as unfinished:
        unfinished.write_bytes(content)


def _flush(path: Path) -> None:
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def _is_full(error: BaseException | None) -> bool:
    while error:
        if isinstance(error, OSError) and error.errno in FULL:
            return True
        error = error.__cause__ or error.__context__
    return False


def cache_folder() -> Path:
    """Where this user's programs keep what they can make again. Raises RuntimeError for users without a home."""
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "nemo_tiedlora"


def content_of(path: Path) -> str:
    """SHA-256 of a file (hexadecimal). Of a large one it is kept, for as long as the file's size and time stay."""
    found = path.stat()
    if found.st_size < LARGE:
        return sha256_of(path)
    identity = f"{path.resolve()} {found.st_size} {found.st_mtime_ns} {found.st_ino}"
    name = hashlib.sha256(identity.encode()).hexdigest()
    with suppress(OSError, RuntimeError):
        return (cache_folder() / "contents" / name).read_text("ascii")
    content = sha256_of(path)
    with suppress(OSError, RuntimeError, UsageError):  # then it is read through again next time
        write_text(cache_folder() / "contents" / name, content)
    return content


def sha256_of(path: Path) -> str:
    """SHA-256 of a file (hexadecimal)."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def check_output(folder: Path, field: str) -> None:
    """Make ``folder`` and prove that it can be written to."""
    try:
        folder.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=folder):
            pass
    except OSError as error:
        raise UsageError(field, str(folder), f"cannot be written to ({error.strerror})") from None
    free = shutil.disk_usage(folder).free
    if free < MINIMUM_FREE_BYTES:
        raise UsageError(
            field, str(folder), f"no disk space: {free / 2**20:.0f} MiB free, {MINIMUM_FREE_BYTES / 2**20:.0f} needed"
        )


def check_not_among(out: Path, *sources: str | Path) -> None:
    """Raise ``UsageError`` if ``out`` would replace something that it is made from."""
    if out.resolve() in [Path(source).resolve() for source in sources]:
        raise UsageError("out", str(out), "would replace what it is made from; give it another name")
