"""Where NeMo's models meet the schemes: every change that ``nemo_tiedlora.register()`` makes to NeMo."""

from collections.abc import Callable
from functools import partial, partialmethod

from nemo.collections.nlp.models.language_modeling import megatron_gpt_sft_model
from nemo.collections.nlp.parts.mixins.nlp_adapter_mixins import NLPAdapterModelMixin
from nemo.collections.nlp.parts.nlp_overrides import NLPDDPStrategy, NLPSaveRestoreConnector
from nemo.collections.nlp.parts.peft_config import PEFT_CONFIG_MAP
from nemo.core.classes.mixins.adapter_mixins import ADAPTER_REGISTRY, get_registered_adapter, register_adapter

from nemo_tiedlora.nemo import resume, saved
from nemo_tiedlora.nemo.adaptations import Adaptations
from nemo_tiedlora.nemo.chat import ChatDataset
from nemo_tiedlora.nemo.datasets import TemplateDataset
from nemo_tiedlora.nemo.mixins import LOCAL, TRANSFORMER_ENGINE
from nemo_tiedlora.nemo.parallel_adapter import ParallelAdapterPEFTConfig
from nemo_tiedlora.nemo.peft_config import FactorPEFTConfig
from nemo_tiedlora.platform.patch import Patch, Restore, patch
from nemo_tiedlora.variants import METHODS


def _around(restore: Restore, owner: type, name: str, ours: Callable) -> None:
    """Replace a method by ``ours``, which is given the stock one after ``self``."""
    restore.set(owner, name, partialmethod(ours, getattr(owner, name)))


@patch(needed=lambda: True)
def schemes(restore: Restore) -> None:
    """NeMo knows the PEFT methods of its ``PEFT_CONFIG_MAP`` only; the schemes become entries of it."""
    for scheme in METHODS:
        if scheme not in PEFT_CONFIG_MAP:
            restore.set_item(PEFT_CONFIG_MAP, scheme, partial(FactorPEFTConfig, scheme))
    if "parallel_adapter" not in PEFT_CONFIG_MAP:
        restore.set_item(PEFT_CONFIG_MAP, "parallel_adapter", ParallelAdapterPEFTConfig)


@patch(needed=lambda: True)
def adapted_layers(restore: Restore) -> None:
    """NeMo's ``ADAPTER_REGISTRY`` has no class that Megatron's linear layers could change to when they get adapters."""
    for adapted in (*LOCAL.values(), *TRANSFORMER_ENGINE.values()):
        base = adapted.__bases__[0]
        if get_registered_adapter(base) is None:
            register_adapter(base, adapted)
            restore.callback(delattr, adapted, "_meta_base_class")
            restore.callback(delattr, base, "_meta_adapter_class")
            restore.callback(ADAPTER_REGISTRY.pop, get_registered_adapter(base).base_class_path)


@patch(needed=lambda: True)
def chat_rows(restore: Restore) -> None:
    """NeMo's ``GPTSFTChatDataset`` takes ``conversations``, in a form of its own; most files have ``messages``."""
    restore.set(megatron_gpt_sft_model, "GPTSFTChatDataset", ChatDataset)


@patch(needed=lambda: True)
def template_rows(restore: Restore) -> None:
    """NeMo's ``GPTSFTDataset`` takes rows whose answer was cut away: nothing of them is learned, and nobody is told."""
    restore.set(megatron_gpt_sft_model, "GPTSFTDataset", TemplateDataset)


def _tie_weights(self, stock, peft_cfg):
    return peft_cfg.tie_weights(self) if isinstance(peft_cfg, FactorPEFTConfig) else stock(self, peft_cfg)


@patch(needed=lambda: True)
def tied_factors(restore: Restore) -> None:
    """NeMo's ``tie_weights`` knows two PEFT configs by type and refuses any other; ours tie by themselves."""
    _around(restore, NLPAdapterModelMixin, "tie_weights", _tie_weights)


def _setup_optimizer_param_groups(self, stock):
    stock(self)
    adaptations = Adaptations.of(self)
    if not adaptations:
        return
    ours = adaptations.parameter_groups()
    placed = {id(tensor) for group in ours for tensor in group["params"]}
    others = {id(p): p for group in self._optimizer_param_groups for p in group["params"] if id(p) not in placed}
    rest = [{"params": list(others.values())}] if others or not ours else []  # a stage may train nothing
    self._optimizer_param_groups = (*rest, *ours)


@patch(needed=lambda: True)
def optimizer_groups(restore: Restore) -> None:
    """NeMo's ``setup_optimizer_param_groups`` puts all that is trained into one group, some of it twice.

    What is inside another adapted module is listed twice. Our tensors come in the groups that their methods want.
    """
    _around(restore, NLPAdapterModelMixin, "setup_optimizer_param_groups", _setup_optimizer_param_groups)


def _configure_callbacks(self):
    callbacks = list(super(NLPAdapterModelMixin, self).configure_callbacks())
    return [*callbacks, self.adaptations.callback] if Adaptations.of(self) else callbacks


@patch(needed=lambda: True)
def training_contract(restore: Restore) -> None:
    """NeMo's training makes no gradient whole that ranks have parts of, and no optimizer step a method's own.

    A callback does, which Lightning asks the model for (``configure_callbacks``) before every fit, test and validation.
    """
    restore.set(NLPAdapterModelMixin, "configure_callbacks", _configure_callbacks)


@patch(needed=lambda: True)
def adapter_files(restore: Restore) -> None:
    """NeMo's ``save_to`` writes adapters as ranks hold them; ``load_adapters`` unpickles them, under that layout only.

    An adapter of ours is one file of whole tensors, which any layout writes and reads; others are read without running
    what is in them. A model without ours is saved as ever.
    """
    _around(restore, NLPAdapterModelMixin, "load_adapters", saved.load_adapters)
    _around(restore, NLPSaveRestoreConnector, "save_to", saved.save_to)


def _on_save_checkpoint(self, checkpoint):
    super(NLPAdapterModelMixin, self).on_save_checkpoint(checkpoint)
    resume.on_save_checkpoint(self, checkpoint)


def _on_load_checkpoint(self, stock, checkpoint):
    return resume.on_load_checkpoint(self, checkpoint) if resume.KEY in checkpoint else stock(self, checkpoint)


@patch(needed=lambda: True)
def whole_checkpoints(restore: Restore) -> None:
    """NeMo's training checkpoints have a file per rank and optimizer states by position: no other layout continues.

    Of a model that trains adapters of ours and nothing else they are one file, everything whole and by key
    (``on_save_checkpoint``, ``on_load_checkpoint``, and of the strategy ``save_checkpoint``, ``load_checkpoint``,
    ``remove_checkpoint``). Any checkpoint is read without running what is in it, and refused if it is damaged or of
    another run.
    """
    restore.set(NLPAdapterModelMixin, "on_save_checkpoint", _on_save_checkpoint)
    _around(restore, NLPAdapterModelMixin, "on_load_checkpoint", _on_load_checkpoint)
    for name in ("save_checkpoint", "load_checkpoint", "remove_checkpoint"):
        _around(restore, NLPDDPStrategy, name, getattr(resume, name))


#: Every change, in the order in which they are made.
PATCHES = tuple(value for value in list(globals().values()) if isinstance(value, Patch))

_in_force: list[Patch] = []
_restore = Restore()


def register() -> list[Patch]:
    """Make the changes that are not in force, all or none of them, and enter the schemes that came since.

    Returns:
        All that is in force.
    """
    with Restore() as restore:
        for one in PATCHES:
            if one is schemes or one not in _in_force:
                one.apply(restore)
        _restore.callback(restore.pop_all().close)
    _in_force[:] = PATCHES
    return list(_in_force)


def unregister() -> None:
    """Take all changes back: the very same objects as before."""
    _restore.close()
    _in_force.clear()
