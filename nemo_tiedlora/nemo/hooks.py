"""Where NeMo's models meet the schemes: its PEFT map, its adapter registry, and how its models train and save."""

from functools import partial, partialmethod

from nemo.collections.nlp.models.language_modeling import megatron_gpt_sft_model
from nemo.collections.nlp.parts.mixins.nlp_adapter_mixins import NLPAdapterModelMixin
from nemo.collections.nlp.parts.nlp_overrides import NLPDDPStrategy, NLPSaveRestoreConnector
from nemo.collections.nlp.parts.peft_config import PEFT_CONFIG_MAP
from nemo.core.classes.mixins.adapter_mixins import get_registered_adapter, register_adapter

from nemo_tiedlora.nemo import resume, saved
from nemo_tiedlora.nemo.adaptations import Adaptations
from nemo_tiedlora.nemo.chat import ChatDataset
from nemo_tiedlora.nemo.datasets import TemplateDataset
from nemo_tiedlora.nemo.mixins import LOCAL, TRANSFORMER_ENGINE
from nemo_tiedlora.nemo.parallel_adapter import ParallelAdapterPEFTConfig
from nemo_tiedlora.nemo.peft_config import FactorPEFTConfig
from nemo_tiedlora.variants import METHODS


def register_schemes() -> None:
    """Enter the schemes into NeMo (idempotent)."""
    for scheme in METHODS:
        PEFT_CONFIG_MAP.setdefault(scheme, partial(FactorPEFTConfig, scheme))
    PEFT_CONFIG_MAP.setdefault("parallel_adapter", ParallelAdapterPEFTConfig)
    for adapted in (*LOCAL.values(), *TRANSFORMER_ENGINE.values()):
        if get_registered_adapter(adapted.__bases__[0]) is None:
            register_adapter(adapted.__bases__[0], adapted)
    megatron_gpt_sft_model.GPTSFTChatDataset = ChatDataset
    megatron_gpt_sft_model.GPTSFTDataset = TemplateDataset
    mixin = NLPAdapterModelMixin
    if not isinstance(mixin.__dict__["tie_weights"], partialmethod):
        mixin.tie_weights = partialmethod(_tie_weights, mixin.tie_weights)
        mixin.setup_optimizer_param_groups = partialmethod(
            _setup_optimizer_param_groups, mixin.setup_optimizer_param_groups
        )
        mixin.configure_callbacks = _configure_callbacks
        mixin.load_adapters = partialmethod(saved.load_adapters, mixin.load_adapters)
        connector = NLPSaveRestoreConnector
        connector.save_to = partialmethod(saved.save_to, connector.save_to)
        mixin.on_save_checkpoint = _on_save_checkpoint
        mixin.on_load_checkpoint = partialmethod(_on_load_checkpoint, mixin.on_load_checkpoint)
        for name in ("save_checkpoint", "load_checkpoint", "remove_checkpoint"):
            stock = getattr(NLPDDPStrategy, name)
            setattr(NLPDDPStrategy, name, partialmethod(getattr(resume, name), stock))


def _tie_weights(self, stock, peft_cfg):
    """NeMo's ``tie_weights`` knows two PEFT configs by type; ask any other to do its own."""
    return peft_cfg.tie_weights(self) if isinstance(peft_cfg, FactorPEFTConfig) else stock(self, peft_cfg)


def _setup_optimizer_param_groups(self, stock):
    """Our tensors in the groups that their methods want; everything once, though NeMo lists what is inside another
    adapted module twice."""
    stock(self)
    adaptations = Adaptations.of(self)
    if not adaptations:
        return
    ours = adaptations.parameter_groups()
    placed = {id(tensor) for group in ours for tensor in group["params"]}
    others = {id(p): p for group in self._optimizer_param_groups for p in group["params"] if id(p) not in placed}
    rest = [{"params": list(others.values())}] if others or not ours else []  # a stage may train nothing
    self._optimizer_param_groups = (*rest, *ours)


def _on_save_checkpoint(self, checkpoint):
    super(NLPAdapterModelMixin, self).on_save_checkpoint(checkpoint)
    resume.on_save_checkpoint(self, checkpoint)


def _on_load_checkpoint(self, stock, checkpoint):
    return resume.on_load_checkpoint(self, checkpoint) if resume.KEY in checkpoint else stock(self, checkpoint)


def _configure_callbacks(self):
    """Lightning asks before every fit, test and validation; what is there already keeps its state."""
    callbacks = list(super(NLPAdapterModelMixin, self).configure_callbacks())
    return [*callbacks, self.adaptations.callback] if Adaptations.of(self) else callbacks
