"""What a training costs."""

import time

from lightning.pytorch import Callback
from megatron.core import parallel_state


class Measured(Callback):
    """Counts the seconds, the tokens and the steps of a training.

    Attributes:
        seconds: spent in training steps, validation excluded.
        tokens: token positions that went through the model in training, padding included.
        steps: optimizer steps taken.
    """

    def __init__(self):
        self.seconds, self.tokens, self.steps = 0.0, 0, 0
        self._started = 0.0
        self._counters: list = []

    def on_train_start(self, trainer, model):
        self._counters = [
            chunk.embedding.register_forward_pre_hook(self._count, with_kwargs=True)
            for chunk in model.get_model_module_list()
            if getattr(chunk, "pre_process", False)
        ]

    def _count(self, module, args, kwargs):
        if module.training:
            ids = kwargs["input_ids"] if "input_ids" in kwargs else args[0]
            self.tokens += ids.numel() * parallel_state.get_data_parallel_world_size()

    def on_train_batch_start(self, trainer, model, batch, batch_idx):
        self._started = time.perf_counter()

    def on_train_batch_end(self, trainer, model, outputs, batch, batch_idx):
        self.seconds += time.perf_counter() - self._started
        self.steps = trainer.global_step

    def on_train_end(self, trainer, model):
        for counter in self._counters:
            counter.remove()
