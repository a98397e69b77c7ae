"""One job at a time in a folder, whatever became of the one before."""

import errno
import fcntl
import multiprocessing
import os
import signal

import pytest

from nemo_tiedlora.errors import UsageError
from nemo_tiedlora.job.lock import hold


def test_a_folder_is_held_until_it_is_left(tmp_path):
    with hold(tmp_path, "field"), pytest.raises(UsageError, match=rf"process {os.getpid()} on .*; wait for its end"):
        hold(tmp_path, "field")
    with hold(tmp_path, "field"):
        pass


def _hold_and_say(folder, connection):
    with hold(folder, "field"):
        connection.send("held")
        signal.pause()


def test_a_killed_job_holds_nothing(tmp_path):
    here, there = multiprocessing.Pipe()
    job = multiprocessing.get_context("fork").Process(target=_hold_and_say, args=(tmp_path, there))
    job.start()
    assert here.recv() == "held"
    with pytest.raises(UsageError, match=f"process {job.pid} "):
        hold(tmp_path, "field")
    job.kill()
    job.join()
    with hold(tmp_path, "field"):
        pass


@pytest.mark.parametrize(
    ("names", "first"),
    [
        ({"RANK": "1", "LOCAL_RANK": "0"}, False),
        ({"SLURM_PROCID": "3"}, False),
        ({"NODE_RANK": "0", "LOCAL_RANK": "1"}, False),
        ({"RANK": "0"}, True),
    ],
)
def test_only_the_first_rank_holds(tmp_path, monkeypatch, names, first):
    for name in ("RANK", "SLURM_PROCID", "OMPI_COMM_WORLD_RANK", "NODE_RANK", "GROUP_RANK", "LOCAL_RANK"):
        monkeypatch.delenv(name, raising=False)
    for name, value in names.items():
        monkeypatch.setenv(name, value)
    with hold(tmp_path, "field"):
        assert any(tmp_path.iterdir()) == first


def test_a_file_system_without_locks_ends_no_job(tmp_path, monkeypatch, capsys):
    def refuse(file, operation):
        raise OSError(errno.ENOLCK, "No locks available")

    monkeypatch.setattr(fcntl, "flock", refuse)
    with hold(tmp_path, "field"):
        pass
    err = capsys.readouterr().err
    assert err.startswith("warning: ") and "No locks available" in err and err.count("\n") == 1
