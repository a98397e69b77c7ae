"""What a NeMo model has of our schemes, and what their training asks of NeMo."""

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any

from lightning.pytorch import Callback

from nemo_tiedlora.attach import Contract, parameter_groups
from nemo_tiedlora.nemo.optimizer_states import inner, stepping, trained
from nemo_tiedlora.parallel.scores import Ranks
from nemo_tiedlora.parallel.synchronise import Synchroniser
from nemo_tiedlora.variants import Bank, Site, TensorSpec


@dataclass(frozen=True)
class Adaptation:
    """One scheme on one model: its tensors, and how the ranks keep them one.

    Args:
        specs: every tensor of the whole model by key, with the first layer that uses it.
    """

    bank: Bank
    synchroniser: Synchroniser
    ranks: Ranks | None
    specs: dict[str, tuple[TensorSpec, Site]]


class Adaptations(dict[str, Adaptation]):
    """A model's adapters by scheme; the model has them as ``model.adaptations`` from its first adapter of ours on.

    Attributes:
        callback: what goes with every training of the model; the same one, so that it keeps its state.
    """

    def __init__(self):
        super().__init__()
        self.callback = Conducting(self)

    @classmethod
    def of(cls, model) -> "Adaptations":
        """Those of ``model``; none if it has no adapter of ours."""
        return getattr(model, "adaptations", None) or cls()

    def parameter_groups(self) -> list[dict[str, Any]]:
        """The groups of all schemes, each with its scheme's name."""
        return [group for scheme, adapted in self.items() for group in parameter_groups(adapted.bank, scheme)]


class Conducting(Callback):
    """Makes gradients whole and every optimizer step the methods', and keeps their state in checkpoints."""

    def __init__(self, adaptations: Adaptations):
        self.adaptations = adaptations
        self.contracts: dict[str, Contract] = {}
        self._loaded: dict[str, Any] = {}

    def on_train_start(self, trainer, model):
        if model.use_mcore_dist_optim:
            for chunk in model.model:
                chunk.finish_grad_sync = partial(_finish_grad_sync, chunk.finish_grad_sync, self.adaptations)
        for scheme, adapted in self.adaptations.items():
            self.contracts[scheme] = Contract(stepping(trainer), adapted.bank, scheme, adapted.ranks)
            if scheme in self._loaded:
                self.contracts[scheme].load_state_dict(self._loaded[scheme])

    def on_before_optimizer_step(self, trainer, model, optimizer):
        """After NeMo has averaged gradients over data-parallel ranks, before it clips them."""
        if model.use_mcore_dist_optim:
            return
        for scheme, adapted in self.adaptations.items():
            tensors = {key: tensor for key, _, tensor in trained(inner(trainer), scheme)}
            adapted.synchroniser(tensors, adapted.bank.variant.active_keys())

    def on_exception(self, trainer, model, exception):
        self.on_train_end(trainer, model)

    def on_train_end(self, trainer, model):
        for chunk in model._unwrap_model_list():
            vars(chunk).pop("finish_grad_sync", None)
        for scheme, contract in self.contracts.items():
            contract.detach()
            for _, tensor in self.adaptations[scheme].bank.trained().values():
                tensor.grad = None  # nothing is about to change them: what is formed for evaluation may be kept

    def state_dict(self):
        return {scheme: contract.state_dict() for scheme, contract in self.contracts.items()}

    def load_state_dict(self, state):
        self._loaded = state


def _finish_grad_sync(stock: Callable[[], None], adaptations: Adaptations) -> None:
    """Before Megatron's distributed optimizer reduces gradients, each data-parallel rank keeping a share of them."""
    for adapted in adaptations.values():
        tensors = {key: tensor for key, (_, tensor) in adapted.bank.trained().items()}
        adapted.synchroniser(tensors, attribute="main_grad")
    stock()
