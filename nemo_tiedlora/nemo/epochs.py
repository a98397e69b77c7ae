"""The loop over batches of a run that may have been interrupted."""

from lightning.pytorch.loops.training_epoch_loop import _TrainingEpochLoop


class Epochs(_TrainingEpochLoop):
    """Lightning's loop over batches, which after a resume makes up for a validation that was due, and for no other.

    Its own would repeat one that was done; NeMo's skips validation in the first step altogether.
    """

    validation_due = False

    def reset(self) -> None:
        super().reset()
        self._restarting = self._restarting and self.validation_due
        self.val_loop.restarting = False  # a validation is never resumed in its middle
