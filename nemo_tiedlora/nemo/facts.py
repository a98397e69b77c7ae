"""What a run measures about itself, kept across interruptions."""

import time

from lightning.pytorch import Callback


class Facts(Callback):
    """Counts training seconds and tokens, and remembers the score before training.

    Attributes:
        before: the metric before training, or None while unknown.
        seconds: spent in training steps, validation excluded.
        tokens: token positions that went through the model in training, padding included.
        steps: optimizer steps taken.
        trainable: number of trained parameters on this rank.
    """

    def __init__(self):
        self.before: float | None = None
        self.seconds, self.tokens, self.steps, self.trainable = 0.0, 0, 0, 0
        self._started = None

    def state_dict(self):
        return {"before": self.before, "seconds": self.seconds, "tokens": self.tokens}

    def load_state_dict(self, state):
        self.before, self.seconds, self.tokens = state["before"], state["seconds"], state["tokens"]

    def on_train_start(self, trainer, model):
        self.steps = trainer.global_step
        self.trainable = sum(p.numel() for p in model.parameters() if p.requires_grad)
        for chunk in model.get_model_module_list():
            if getattr(chunk, "pre_process", False):
                self._hook = chunk.embedding.register_forward_pre_hook(self._count, with_kwargs=True)

    def _count(self, module, args, kwargs):
        if module.training:
            self.tokens += (kwargs["input_ids"] if "input_ids" in kwargs else args[0]).numel()

    def on_train_batch_start(self, trainer, model, batch, batch_idx):
        self._started = time.perf_counter()

    def on_train_batch_end(self, trainer, model, outputs, batch, batch_idx):
        self.seconds += time.perf_counter() - self._started
        self.steps = trainer.global_step

    def on_train_end(self, trainer, model):
        if getattr(self, "_hook", None):
            self._hook.remove()
