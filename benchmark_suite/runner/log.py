"""A cell's log: what was done when, and what the host said meanwhile."""

import logging
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

#: Told by the runner and the backends; the root hears both.
LOG = logging.getLogger("benchmark_suite")
for name in ("benchmark_suite", "nemo_tiedlora"):
    logging.getLogger(name).setLevel(logging.INFO)


@contextmanager
def logged(path: Path, apart: Sequence[str]) -> Iterator[None]:
    """Add to ``path`` what any logger is told inside the block.

    Args:
        apart: loggers that keep what they hear from the root.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    handler = logging.FileHandler(path, encoding="utf-8")
    handler.setFormatter(logging.Formatter("%(asctime)s %(levelname)s %(name)s: %(message)s"))
    loggers = [logging.getLogger(name) for name in (None, *apart)]
    for logger in loggers:
        logger.addHandler(handler)
    try:
        yield
    finally:
        for logger in loggers:
            logger.removeHandler(handler)
        handler.close()
