"""Keeps a sweep going when something kills its process: the system for its memory, or a crash in a driver."""

import ctypes
import os
import signal
import sys
from pathlib import Path

#: Deaths in a row that brought no new result, after which more than single cells must be to blame.
PATIENCE = 6
PR_SET_PDEATHSIG = 1


def survive(results: Path) -> int:
    """Return in a child process, which is started again whenever a signal ends it; this process ends as it does.

    Call it before anything heavy is imported: the child is a fork. Cells count their starts, so one that kills its
    process every time is given up. A child never outlives its parent.

    Args:
        results: folder in which cells that have ended leave a ``result.json``.

    Returns:
        How often it was started before.
    """
    restarts, deaths, known = 0, 0, _results(results)
    while child := _fork():
        killer = _wait(child)
        now, restarts = _results(results), restarts + 1
        deaths, known = (deaths + 1 if now == known else 1), now
        if killer in (signal.SIGINT, signal.SIGTERM) or deaths == PATIENCE:
            print(f"ended by {killer.name}; the same command goes on from here", file=sys.stderr)
            sys.exit(128 + killer)
        print(f"killed by {killer.name}; starting again", file=sys.stderr)
    return restarts


def _results(folder: Path) -> int:
    return sum(1 for _ in folder.rglob("result.json"))


def _fork() -> int:
    sys.stdout.flush()
    sys.stderr.flush()
    parent = os.getpid()
    child = os.fork()
    if not child and sys.platform == "linux":
        ctypes.CDLL(None).prctl(PR_SET_PDEATHSIG, signal.SIGKILL)
        if os.getppid() != parent:  # it died before this was said
            os._exit(1)
    return child


def _wait(child: int) -> signal.Signals:
    """The signal that ended the child, or that this process was told to end by; else end with the child's exit code."""
    told = []

    def note(number: int, _) -> None:
        told.append(signal.Signals(number))
        if number == signal.SIGTERM:  # a terminal sends SIGINT to both
            os.kill(child, number)

    before = {number: signal.signal(number, note) for number in (signal.SIGINT, signal.SIGTERM)}
    _, status = os.waitpid(child, 0)
    for number, handler in before.items():
        signal.signal(number, handler)
    if signal.SIGTERM in told or (told and status):  # Lightning ends on the first with exit code 0, on SIGINT with 1
        return told[0]
    if os.WIFSIGNALED(status):
        return signal.Signals(os.WTERMSIG(status))
    sys.exit(os.WEXITSTATUS(status))
