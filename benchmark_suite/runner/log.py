"""A cell's log: what was done when, and what NeMo, Megatron and Lightning said meanwhile."""

import logging
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

#: Told by the runner and the workbench; the root hears both.
LOG = logging.getLogger("benchmark_suite")
for name in ("benchmark_suite", "nemo_tiedlora"):
    logging.getLogger(name).setLevel(logging.INFO)
#: Loggers that keep what they hear from the root.
_APART = ("nemo_logger", "lightning.pytorch", "lightning.fabric")


@contextmanager
def logged(path: Path) -> Iterator[None]:
    """Add to ``path`` what any logger is told inside the block."""
    import lightning.pytorch  # noqa: F401  (at its import it asks whether the root has handlers, and must find none)

    path.parent.mkdir(parents=True, exist_ok=True)
    handler = logging.FileHandler(path, encoding="utf-8")
    handler.setFormatter(logging.Formatter("%(asctime)s %(levelname)s %(name)s: %(message)s"))
    loggers = [logging.getLogger(name) for name in (None, *_APART)]
    for logger in loggers:
        logger.addHandler(handler)
    try:
        yield
    finally:
        for logger in loggers:
            logger.removeHandler(handler)
        handler.close()
