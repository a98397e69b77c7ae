"""Keeps the host's chatter off the screen.

NeMo and Megatron send information to standard output, and warnings and errors to standard error. Inside ``quiet``
their standard output is dropped, and of the rest only warnings to those who write code, Lightning's guesses, and
warnings known to say nothing about the user's run; all others are shown. NeMo's log file in the run's folder still has
everything.
"""

import logging
import os
import re
import sys
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from typing import TextIO

#: Python warnings that are to those who write code.
TO_DEVELOPERS = (
    DeprecationWarning,
    PendingDeprecationWarning,
    FutureWarning,
    SyntaxWarning,
    ImportWarning,
    ResourceWarning,
)
#: Other warnings that every run gives, as they pass through NeMo's logger (Python's warnings do too).
KNOWN_WARNINGS = re.compile(
    "|".join(
        (
            r"Apex was not found",
            r"does not have field\.name",
            r"is not long enough to truncate",
            r"No training data found, reconfiguring microbatches",
            r"requires DistributedCheckpointIO plugin to be used\. Setting up a default",
            r"Exp_manager is logging to .* already exists",
            r"No version folders would be created",
            r"no checkpoints found in checkpoint_dir",
            r"difference in the common state dict in different ranks",  # the ranks' own counts of rows and seconds
            r"told to monitor a validation value and trainer's max_steps",
            r"Ignoring `trainer\.max_epochs`",
        )
    )
)


def _is_news(record: logging.LogRecord) -> bool:
    if record.levelno != logging.WARNING:
        return record.levelno > logging.WARNING
    return not KNOWN_WARNINGS.search(record.getMessage())


@contextmanager
def quiet(enabled: bool = True) -> Iterator[TextIO]:
    """Filter what the host prints inside the block; yields the real standard output, for results.

    Enter it before the rest of NeMo is imported: the import has much to say.
    """
    sys.stdout.flush()
    results = os.fdopen(os.dup(1), "w", encoding="utf-8")
    if not enabled:
        with results:
            yield results
        return
    nowhere = os.open(os.devnull, os.O_WRONLY)
    os.dup2(nowhere, 1)  # C++ helpers print too, so sys.stdout is not enough
    os.close(nowhere)
    from lightning.fabric.utilities.warnings import PossibleUserWarning
    from nemo.utils import logging as nemo_logging

    stock = warnings.showwarning
    unseen = (*TO_DEVELOPERS, PossibleUserWarning)  # the latter are Lightning's guesses, say that srun was forgotten

    def showwarning(message, category, filename, lineno, file=None, line=None):
        if issubclass(category, unseen):
            nemo_logging.info("%s", warnings.formatwarning(message, category, filename, lineno, line))
        else:
            stock(message, category, filename, lineno, file, line)

    warnings.showwarning = showwarning
    lightnings = logging.getLogger("lightning.pytorch").handlers + logging.getLogger("lightning.fabric").handlers
    handlers = [handler for handler in lightnings if not isinstance(handler, logging.FileHandler)]
    handlers += [handler for name, handler in nemo_logging._handlers.items() if name.startswith("stream_")]
    for handler in handlers:
        handler.addFilter(_is_news)
    try:
        yield results
    finally:
        warnings.showwarning = stock
        for handler in handlers:
            handler.removeFilter(_is_news)
        sys.stdout.flush()
        results.flush()
        os.dup2(results.fileno(), 1)
        results.close()
