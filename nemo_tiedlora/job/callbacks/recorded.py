"""What a run was started with, in its checkpoints."""

import json
from pathlib import Path
from typing import Any

from lightning.pytorch import Callback

from nemo_tiedlora.errors import UsageError
from nemo_tiedlora.job.record import Record
from nemo_tiedlora.nemo.checked import Checked


class Recorded(Callback):
    """Puts into every checkpoint what its run was started with, and refuses those of another run."""

    KEY = "run"

    def __init__(self, record: Record):
        self.record = record

    def on_save_checkpoint(self, trainer, model, checkpoint):
        checkpoint[self.KEY] = self.record.as_dict()

    def check_continues(self, checkpoint: dict[str, Any], path: str | Path, max_steps: int) -> None:
        """Raise ``UsageError`` unless this run can go on from ``checkpoint``, before anything is taken from it."""
        if self.KEY not in checkpoint:
            way_out = "does not say what it was trained with; remove it to start again, or name another folder"
            raise UsageError("checkpoint", str(path), way_out)
        try:
            saved = Record(**json.loads(json.dumps(checkpoint[self.KEY])))
            self.record.check_continues(saved, path)
        except UsageError:
            raise
        except (TypeError, KeyError, AttributeError, ValueError, RecursionError) as error:
            raise Checked(path, checkpoint).error(f"{self.KEY} is damaged ({type(error).__name__})") from None
        step = checkpoint.get("global_step")
        if type(step) is int and step > max_steps:
            way_out = f"{path} is of step {step} already; name another folder"
            raise UsageError("trainer.max_steps", max_steps, way_out)
