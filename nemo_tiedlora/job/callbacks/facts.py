"""What a run measures about itself, kept across interruptions."""

from nemo_tiedlora.job.callbacks.measured import Measured


class Facts(Measured):
    """Also remembers the score before training.

    Attributes:
        before: the metric before training, or None while unknown; ``generated_before``: sample completions then.
        ended: whether training ended in this process.
    """

    def __init__(self):
        super().__init__()
        self.before: float | None = None
        self.generated_before: list[str] = []
        self.ended = False

    def state_dict(self):
        return {name: getattr(self, name) for name in ("before", "generated_before", "seconds", "tokens", "steps")}

    def load_state_dict(self, state):
        if not self.ended:  # the best checkpoint, which is restored after training, knows less
            vars(self).update(state)

    def on_train_end(self, trainer, model):
        self.ended = True
        super().on_train_end(trainer, model)
