"""What a run measures about itself, kept across interruptions."""

import time

from lightning.pytorch import Callback
from megatron.core import parallel_state


class Facts(Callback):
    """Counts training seconds and tokens, and remembers the score before training.

    Attributes:
        before: the metric before training, or None while unknown; ``generated_before``: sample completions then.
        seconds: spent in training steps, validation excluded.
        tokens: token positions that went through the model in training, padding included.
        steps: optimizer steps taken. ended: whether training ended in this process.
    """

    def __init__(self):
        self.before: float | None = None
        self.generated_before: list[str] = []
        self.seconds, self.tokens, self.steps = 0.0, 0, 0
        self._started = None
        self.ended = False

    def state_dict(self):
        return {name: getattr(self, name) for name in ("before", "generated_before", "seconds", "tokens", "steps")}

    def load_state_dict(self, state):
        if not self.ended:  # the best checkpoint, which is restored after training, knows less
            vars(self).update(state)

    def on_train_start(self, trainer, model):
        for chunk in model.get_model_module_list():
            if getattr(chunk, "pre_process", False):
                self._hook = chunk.embedding.register_forward_pre_hook(self._count, with_kwargs=True)

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
        self.ended = True
        if getattr(self, "_hook", None):
            self._hook.remove()
