"""What of the host's talk reaches the screen."""

import logging
import os
import warnings

import pytest
from lightning.fabric.utilities.warnings import PossibleUserWarning
from nemo.utils import logging as nemo_logging

from nemo_tiedlora.nemo.quiet import quiet


@pytest.fixture
def log(tmp_path):
    """NeMo's handlers as a script has them: the screen, and a file with everything."""
    logger = nemo_logging._logger
    before, streams = list(logger.handlers), dict(nemo_logging._handlers)
    nemo_logging.reset_stream_handler()
    file = logging.FileHandler(tmp_path / "log.txt")
    logger.addHandler(file)
    nemo_logging.captureWarnings(True)
    yield tmp_path / "log.txt"
    file.close()
    logger.handlers[:] = before
    nemo_logging._handlers.clear()
    nemo_logging._handlers.update(streams)


def say():
    warnings.warn("old name", FutureWarning, stacklevel=1)
    warnings.warn("use srun?", PossibleUserWarning, stacklevel=1)
    nemo_logging.warning("Apex was not found")
    nemo_logging.info("building")
    os.write(1, b"from a C++ helper\n")
    warnings.warn("your numbers overflow", UserWarning, stacklevel=1)
    nemo_logging.warning("your file is odd")
    nemo_logging.error("your disk is gone")


def test_only_what_may_concern_the_user_is_shown_and_the_log_has_all(log, capfd):
    with warnings.catch_warnings():
        warnings.simplefilter("always")
        nemo_logging.old_warnings_showwarning = None
        nemo_logging.captureWarnings(True)
        with quiet() as results:
            say()
            print("result", file=results)
        shown = capfd.readouterr()
        assert shown.out == "result\n"
        for news in ("your numbers overflow", "your file is odd", "your disk is gone"):
            assert news in shown.err
        for noise in ("old name", "use srun?", "Apex", "building", "C++"):
            assert noise not in shown.err
        logged = log.read_text()
        assert "old name" in logged and "use srun?" in logged and "Apex" in logged
        say()
        shown = capfd.readouterr()
    assert "old name" in shown.err and "Apex" in shown.err and "C++" in shown.out
