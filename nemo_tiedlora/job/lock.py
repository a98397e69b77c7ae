"""One job at a time in a folder."""

import fcntl
import os
import socket
import sys
from contextlib import AbstractContextManager, nullcontext
from pathlib import Path

from nemo_tiedlora.errors import UsageError
from nemo_tiedlora.ranks import is_first_rank

#: Below a folder of its own: NeMo moves the files of a run's folder aside when the run continues.
LOCK = Path(".lock", "job")


def hold(folder: Path, field: str) -> AbstractContextManager:
    """Keep other jobs out of ``folder`` until what this returns is left or the process ends, however it ends.

    Only a job's first rank does. Where the file system has no locks, this warns and goes on.

    Raises:
        UsageError: another job is in it.
    """
    if not is_first_rank():
        return nullcontext()
    path = folder / LOCK
    try:
        path.parent.mkdir(exist_ok=True)
        file = path.open("a+", encoding="utf-8")
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        holder = path.read_text("utf-8").strip() or "just started"
        way_out = f"another job is running in it ({holder}); wait for its end, or give this one another folder"
        raise UsageError(field, str(folder), way_out) from None
    except OSError as error:
        print(f"warning: a second job in {folder} would go unnoticed: no locks ({error.strerror})", file=sys.stderr)
        return nullcontext()
    file.truncate(0)
    print(f"process {os.getpid()} on {socket.gethostname()}", file=file, flush=True)
    return file
