"""What ``transformers.Trainer`` needs to know about an adapter."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import transformers
from transformers.trainer_callback import ExportableState

from nemo_tiedlora.attach import Contract
from nemo_tiedlora.attach.placed import NAME

if TYPE_CHECKING:
    from nemo_tiedlora.attach import Attached


class AdapterCallback(transformers.TrainerCallback, ExportableState):
    """Makes every step of a Trainer's optimizer the method's, while it trains.

    Trainer's checkpoints hold the adapter's tensors with the model's; what the method knows besides, such as DynaLoRA's
    choices, is in their ``trainer_state.json``, from which a resumed run goes on.
    """

    def __init__(self, adapter: Attached):
        self.adapter = adapter
        self.contract: Contract | None = None

    def on_train_begin(self, args, state, control, optimizer=None, **kwargs) -> None:
        """Attach to the optimizer.

        Raises:
            UsageError: it was not made of ``adapter.parameter_groups(lr)``, and the method needs that.
        """
        while hasattr(optimizer, "optimizer"):  # accelerate's wraps the one that steps
            optimizer = optimizer.optimizer
        self.contract = self.adapter.attach_to(optimizer)
        kept = state.stateful_callbacks.get(type(self).__name__)
        if kept and state.global_step:
            self.contract.load_state_dict(kept["attributes"]["contract"])

    def on_train_end(self, args, state, control, **kwargs) -> None:
        """Let the optimizer be."""
        if self.contract:
            self.contract.detach()

    def state(self) -> dict[str, Any]:
        """What Trainer puts into its checkpoints, under the class's name; JSON can hold it."""
        return {"args": {}, "attributes": {"contract": self.contract.state_dict() if self.contract else None}}


def callback_for(adapter: Attached) -> AdapterCallback:
    """An adapter's callback, of a class of its own: with ``restore_callback_states_from_checkpoint``, Trainer makes
    callbacks anew from nothing but their class, and states of several adapters are told apart by its name."""

    class Bound(AdapterCallback):
        def __init__(self):
            super().__init__(adapter)

    Bound.__name__ = AdapterCallback.__name__ + ("" if adapter.name == NAME else f"_{adapter.name}")
    return Bound()
