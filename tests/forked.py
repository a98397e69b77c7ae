"""Processes of their own that begin with NeMo imported, which takes nine seconds: forks of one server per test process.

They stand for `python SCRIPT` and for torchrun; tests of how a script starts run it as it is.
"""

from __future__ import annotations

import multiprocessing
import os
import runpy
import signal
import socket
import subprocess
import sys
import traceback
from collections.abc import Callable
from multiprocessing import connection, forkserver
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any
from unittest.mock import patch

import toy

CONTEXT = multiprocessing.get_context("forkserver")
CONTEXT.set_forkserver_preload(["preloaded"])
HERE = Path(__file__).parent
ENVIRONMENT = toy.FRESH | {"PYTHONPATH": f"{HERE}:{HERE.parent}"}


class Script:
    """A running `python ARGUMENTS`, where the first argument is a script, or -m and the second one a module.

    Args:
        environment: what is in its environment besides what all have.
    """

    def __init__(
        self, *arguments: Any, cwd: Path | None = None, stdin: str = "", environment: dict[str, str] | None = None
    ):
        self._streams = TemporaryDirectory()
        self._paths = [Path(self._streams.name) / name for name in ("in", "out", "err")]
        self._paths[0].write_text(stdin)
        arguments = list(map(str, arguments))
        self._process = _started(_run_script, self._paths, str(cwd or Path.cwd()), environment or {}, arguments)

    @property
    def pid(self) -> int:
        """The number of its process."""
        return self._process.pid

    def poll(self) -> int | None:
        """The exit code; None while it runs."""
        return self._process.exitcode

    def send_signal(self, number: int) -> None:
        """Send it a signal."""
        os.kill(self._process.pid, number)

    def finish(self, timeout: float = 600) -> tuple[int, str, str]:
        """Wait for its end: the exit code, what it wrote to standard output, and to standard error."""
        self._process.join(timeout)
        if self.poll() is None:
            self.send_signal(signal.SIGKILL)
            raise subprocess.TimeoutExpired("script", timeout)
        _, out, err = (path.read_text() for path in self._paths)
        self._streams.cleanup()
        return self.poll(), out, err


def script(*arguments: Any, **options: Any) -> tuple[int, str, str]:
    """Run `python ARGUMENTS` to its end: the exit code, standard output and standard error."""
    return Script(*arguments, **options).finish()


def torchrun(processes: int, *arguments: Any, **options: Any) -> list[Script]:
    """`torchrun --nproc-per-node PROCESSES ARGUMENTS`, running: its ranks in order, with none to end the others."""
    return [Script(*arguments, environment=environment, **options) for environment in _environments(processes)]


def ranks(processes: int, target: Callable, *arguments: Any, timeout: float = 900) -> None:
    """Run ``target(*arguments)`` in processes with the environment that torchrun gives; where one fails, end them all.

    Raises:
        AssertionError: with the traceback of those that failed.
    """
    with TemporaryDirectory() as folder:
        group = [
            _started(_run_rank, Path(folder), environment, target, arguments)
            for environment in _environments(processes)
        ]
        waiting = {rank.sentinel: rank for rank in group}
        while waiting:
            ended = connection.wait(waiting, timeout)
            codes = [waiting.pop(sentinel).exitcode for sentinel in ended]
            if not ended or any(codes):
                for rank in waiting.values():  # they would wait for the others
                    rank.kill()
                said = "\n".join(path.read_text() for path in sorted(Path(folder).iterdir()))
                raise AssertionError(said[-6000:] or f"a rank ended with {codes} (none: after {timeout} s)")


def _environments(processes: int) -> list[dict[str, str]]:
    """What torchrun would tell each of its processes on one machine."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    common = {"WORLD_SIZE": processes, "LOCAL_WORLD_SIZE": processes, "GROUP_RANK": 0}
    common |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port, "TORCHELASTIC_RUN_ID": "tests"}
    named = [common | {"RANK": rank, "LOCAL_RANK": rank} for rank in range(processes)]
    return [{name: str(value) for name, value in one.items()} for one in named]


def _started(target: Callable, *arguments: Any) -> multiprocessing.Process:
    with patch.dict(os.environ, ENVIRONMENT, clear=True):
        forkserver.ensure_running()
    process = CONTEXT.Process(target=target, args=arguments)
    process.start()
    return process


def _run_script(streams: list[Path], folder: str, environment: dict[str, str], arguments: list[str]) -> None:
    os.environ.update(environment)
    signal.signal(signal.SIGINT, signal.default_int_handler)  # a shell's background jobs, tests too, ignore these two
    signal.signal(signal.SIGHUP, signal.SIG_DFL)
    for number, path in enumerate(streams):
        os.dup2(os.open(path, os.O_RDWR | os.O_CREAT), number)
    sys.stdin = open(0, closefd=False)  # noqa: SIM115, until the process ends
    os.chdir(folder)
    module = arguments[0] == "-m"
    sys.argv = arguments[module:]
    sys.path[0] = folder if module else str(Path(arguments[0]).parent)
    if module:
        runpy.run_module(sys.argv[0], run_name="__main__", alter_sys=True)
    else:
        runpy.run_path(sys.argv[0], run_name="__main__")


def _run_rank(folder: Path, environment: dict[str, str], target: Callable, arguments: tuple) -> None:
    os.environ.update(environment)
    try:
        target(*arguments)
    except BaseException:
        rank = environment["RANK"]
        (folder / rank).write_text(f"rank {rank}: {traceback.format_exc()}")
        os._exit(1)
    os._exit(0)
