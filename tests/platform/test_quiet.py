"""What of the host's talk reaches the screen."""

import forked

SCRIPT = """
import os, warnings
from lightning.fabric.utilities.warnings import PossibleUserWarning
from nemo.utils import logging
from nemo_tiedlora.platform.quiet import quiet

class OddNumbers(UserWarning):  # a category of its own: NeMo drops those that any library has a filter for
    pass

def say(when):
    warnings.warn(f"{when}: old name", FutureWarning)
    warnings.warn(f"{when}: use srun?", PossibleUserWarning)
    logging.warning(f"{when}: Apex was not found")
    logging.info(f"{when}: building")
    os.write(1, f"{when}: from a C++ helper".encode())
    warnings.warn(f"{when}: your numbers overflow", OddNumbers)
    logging.warning(f"{when}: your file is odd")
    logging.error(f"{when}: your disk is gone")

logging.add_file_handler("log.txt")
with quiet() as results:
    say("inside")
    print("result", file=results)
say("after")
"""
NOISE = ("old name", "use srun?", "Apex was not found", "building", "from a C++ helper")
NEWS = ("your numbers overflow", "your file is odd", "your disk is gone")


def test_only_what_may_concern_the_user_is_shown_and_the_log_has_all(tmp_path):
    (tmp_path / "script.py").write_text(SCRIPT)
    code, out, err = forked.script(tmp_path / "script.py", cwd=tmp_path)
    assert code == 0, err
    assert out.startswith("result\n") and "inside" not in out
    shown = {words: f"inside: {words}" in err for words in (*NOISE, *NEWS)}
    assert shown == dict.fromkeys(NOISE, False) | dict.fromkeys(NEWS, True), err
    log = (tmp_path / "log.txt").read_text()
    assert all(f"inside: {words}" in log for words in (*NOISE[:-1], *NEWS))
    assert all(f"after: {words}" in out + err for words in (*NOISE[2:], *NEWS)), "it is no longer quiet"
