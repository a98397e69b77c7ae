"""Where NeMo 2.4 and megatron-core 0.13 do not fit together, on any hardware."""

from __future__ import annotations

import inspect
import os
from contextlib import contextmanager
from copy import deepcopy
from functools import wraps

import torch

from nemo_tiedlora.platform.patch import Restore, patch


@patch(needed=lambda: "NVIDIA_PYTORCH_VERSION" not in os.environ)
def container_version(restore: Restore) -> None:
    """Outside an NVIDIA container NeMo matches a pattern against a version that is not set: a TypeError.

    Any release from 23.11 on leaves torch's settings alone.
    """
    restore.set_item(os.environ, "NVIDIA_PYTORCH_VERSION", "25.07")


def _mixins_outdated() -> bool:
    from nemo.collections.nlp.modules.common.megatron.adapters.mcore_mixins import MCoreSelfAttentionMixin

    return "inference_context" not in inspect.signature(MCoreSelfAttentionMixin.forward).parameters


def _enabled_adapter(module, name):
    """The module's adapter of that name, None where there is none or it is switched off."""
    if not module.is_adapter_available():
        return None
    adapter = module.get_adapter_module(name)
    return adapter if adapter is not None and module.adapter_cfg[name]["enabled"] else None


@contextmanager
def _adding(module, term):
    """While open, the first output y of `module` on input x becomes y + term(x, y)."""
    handle = module.register_forward_hook(lambda _, x, y: (y[0] + term(x[0], y[0]), *y[1:]))
    try:
        yield
    finally:
        handle.remove()


@patch(needed=_mixins_outdated)
def adapter_mixins(restore: Restore) -> None:
    """NeMo's adapter mixins copied megatron-core's forward passes, which have other arguments since.

    So every stock adapter scheme fails in the first layer. The mixins get megatron-core's own forward back, and what
    they added to the copies is added to the output of the inner module in question.
    """
    from megatron.core.transformer.attention import SelfAttention
    from megatron.core.transformer.transformer_block import TransformerBlock
    from megatron.core.transformer.transformer_layer import TransformerLayer
    from nemo.collections.nlp.modules.common.megatron.adapters import mcore_mixins
    from nemo.collections.nlp.modules.common.megatron.adapters.parallel_adapters import AdapterName

    def self_attention(self, *args, **kwargs):
        dense = _enabled_adapter(self, AdapterName.LORA_DENSE_ATTENTION_ADAPTER)
        if dense is None:
            return SelfAttention.forward(self, *args, **kwargs)
        with _adding(self.linear_proj, lambda x, y: dense(x)):
            return SelfAttention.forward(self, *args, **kwargs)

    def transformer_layer(self, *args, **kwargs):
        after_attention = _enabled_adapter(self, AdapterName.PRE_ATTN_ADAPTER)
        after_mlp = _enabled_adapter(self, AdapterName.POST_ATTN_ADAPTER)
        with Restore() as around:
            if after_attention is not None:
                around.enter_context(_adding(self.self_attention, lambda x, y: after_attention(y)))
            if after_mlp is not None:
                around.enter_context(_adding(self.mlp, lambda x, y: after_mlp(y)))
            return TransformerLayer.forward(self, *args, **kwargs)

    def transformer_block(self, *args, **kwargs):
        hidden_states = TransformerBlock.forward(self, *args, **kwargs)
        head = _enabled_adapter(self, AdapterName.MLP_HEAD_ADAPTER)
        return hidden_states if head is None else head(hidden_states)

    restore.set(mcore_mixins.MCoreSelfAttentionMixin, "forward", self_attention)
    restore.set(mcore_mixins.MCoreTransformerLayerMixin, "forward", transformer_layer)
    restore.set(mcore_mixins.MCoreTransformerBlockMixin, "forward", transformer_block)


def _wrap_checkpoint(restore: Restore, wrap) -> None:
    from megatron.core import tensor_parallel
    from megatron.core.tensor_parallel import random

    checkpoint = wraps(random.checkpoint)(wrap(random.checkpoint))
    restore.set(random, "checkpoint", checkpoint)
    restore.set(tensor_parallel, "checkpoint", checkpoint)


@patch(needed=lambda: True)
def recompute_with_frozen_input(restore: Restore) -> None:
    """Activation recomputation over a frozen base trains nothing, silently.

    A recomputed block runs its backward only if one of its inputs wants a gradient, and the output of a frozen
    embedding does not: adapters inside the block get none.
    """

    def wrap(stock):
        def checkpoint(function, distribute_saved_activations, *args):
            wanted = any(arg.requires_grad for arg in args if isinstance(arg, torch.Tensor))
            if torch.is_grad_enabled() and not wanted:
                hidden_states, *rest = args
                args = hidden_states.detach().requires_grad_(), *rest
            return stock(function, distribute_saved_activations, *args)

        return checkpoint

    _wrap_checkpoint(restore, wrap)


@patch(needed=lambda: True)
def recompute_in_mixed_precision(restore: Restore) -> None:
    """Activation recomputation happens outside the autocast region of the forward pass.

    With float32 weights (`megatron_amp_O2=False`) the recomputed layers then multiply bfloat16 with float32.
    """

    def wrap(stock):
        def checkpoint(function, distribute_saved_activations, *args):
            device = args[0].device.type
            enabled, dtype = torch.is_autocast_enabled(device), torch.get_autocast_dtype(device)

            def as_in_forward(*args):
                with torch.autocast(device, dtype, enabled):
                    return function(*args)

            return stock(as_in_forward if enabled else function, distribute_saved_activations, *args)

        return checkpoint

    _wrap_checkpoint(restore, wrap)


@patch(needed=lambda: True)
def ia3_without_query_groups(restore: Restore) -> None:
    """The `ia3` scheme multiplies with `num_query_groups`, which is null in every model without grouped attention.

    The stock `lora` scheme knows that null means one group per head.
    """
    from nemo.collections.nlp.parts.peft_config import IA3PEFTConfig
    from omegaconf import open_dict

    stock = IA3PEFTConfig.__init__

    @wraps(stock)
    def init(self, cfg):
        cfg = cfg.copy()
        with open_dict(cfg):
            cfg.num_query_groups = cfg.get("num_query_groups") or cfg.num_attention_heads
        stock(self, cfg)

    restore.set(IA3PEFTConfig, "__init__", init)


@patch(needed=lambda: True)
def generation_under_sequence_parallelism(restore: Restore) -> None:
    """Generation, hence validation with a metric, fails under sequence parallelism: prompts do not divide evenly.

    Sequence parallelism changes no result, so it is off while text is generated. Embeddings and adapters have switches
    of their own, under other names.
    """
    from nemo.collections.nlp.modules.common import text_generation_utils

    stock = text_generation_utils.synced_generate
    switches = "sequence_parallel", "_sequence_parallel", "reduce_scatter_embeddings"

    @wraps(stock)
    def synced_generate(model, *args, **kwargs):
        with Restore() as around:
            state = vars(model)
            configs = [state[name] for name in ("transformer_config", "model_parallel_config") if name in state]
            for thing in (*configs, *model.modules()):
                for switch in switches:
                    if vars(thing).get(switch) is True:
                        around.set(thing, switch, False)
            return stock(model, *args, **kwargs)

    restore.set(text_generation_utils, "synced_generate", synced_generate)


@patch(needed=lambda: True)
def optimizer_steps_in_checkpoints(restore: Restore) -> None:
    """A full fine-tuning checkpoint with `optim.name=adamw` fails: torch's Adam counts steps per parameter.

    A scalar cannot be sharded like its parameter. The count is kept once, as in megatron-core's own optimizers.
    """
    from nemo.collections.nlp.parts import nlp_overrides

    stock_shard = nlp_overrides.optim_state_to_sharding_state
    stock_load = nlp_overrides.NLPDDPStrategy.load_optimizer_state_dict

    @wraps(stock_shard)
    def shard(optim_state_dict, id_to_sharded_param_map, exclude_keys=()):
        steps = [state["step"] for state in optim_state_dict["state"].values() if "step" in state]
        stock_shard(optim_state_dict, id_to_sharded_param_map, (*exclude_keys, "step"))
        if steps:
            optim_state_dict["state"]["common_step"] = steps[0]

    @wraps(stock_load)
    def load(self, checkpoint):
        for optimizer in checkpoint.get("optimizer_states") or ():
            states = optimizer.get("optimizer", optimizer).get("state", {})
            if "common_step" in states:
                step = states.pop("common_step")
                for state in states.values():
                    state["step"] = deepcopy(step)
        stock_load(self, checkpoint)

    restore.set(nlp_overrides, "optim_state_to_sharding_state", shard)
    restore.set(nlp_overrides.NLPDDPStrategy, "load_optimizer_state_dict", load)


@patch(needed=lambda: True)
def micro_batches(restore: Restore) -> None:
    """Generation, validation and testing set Megatron's micro-batch calculator to their own rows and leave it so.

    Training then goes on in other pieces than asked for, or fails where those do not divide the batch. They leave it as
    they found it, and training begins with the sizes of its own data.
    """
    from megatron.core import num_microbatches_calculator as calculator
    from megatron.core import parallel_state
    from nemo.collections.nlp.models.language_modeling.megatron_gpt_sft_model import MegatronGPTSFTModel

    stock = MegatronGPTSFTModel
    in_force = "_GLOBAL_NUM_MICROBATCHES_CALCULATOR"

    def use(global_batch_size: int, micro_batch_size: int, ranks: int) -> None:
        calculator.reconfigure_num_microbatches_calculator(0, None, global_batch_size, micro_batch_size, ranks)

    def leaving_as_found(step):
        @wraps(step)
        def predict_step(self, batch, *args, **kwargs):
            found = getattr(calculator, in_force)
            rows = len(batch) if isinstance(batch, list) else len(batch["tokens"])
            use(rows, rows, 1)  # it divides by the number in force, and generates in one piece anyway
            try:
                return step(self, batch, *args, **kwargs)
            finally:
                setattr(calculator, in_force, found)

        return predict_step

    def remembering(start):
        @wraps(start)
        def on_epoch_start(self):
            self.__dict__["found_micro_batches"] = getattr(calculator, in_force)
            return start(self)

        return on_epoch_start

    def putting_back(end):
        @wraps(end)
        def on_epoch_end(self):
            ended = end(self)
            if "found_micro_batches" in self.__dict__:  # NeMo also calls this where no epoch began
                setattr(calculator, in_force, self.__dict__.pop("found_micro_batches"))
            return ended

        return on_epoch_end

    def training(start):
        @wraps(start)
        def on_train_epoch_start(self):
            start(self)
            sizes = self.cfg.data.train_ds
            use(sizes.global_batch_size, sizes.micro_batch_size, parallel_state.get_data_parallel_world_size())

        return on_train_epoch_start

    restore.set(stock, "predict_step", leaving_as_found(stock.predict_step))
    for stage in ("validation", "test"):
        for moment, change in (("start", remembering), ("end", putting_back)):
            name = f"on_{stage}_epoch_{moment}"
            restore.set(stock, name, change(getattr(stock, name)))
    restore.set(stock, "on_train_epoch_start", training(stock.on_train_epoch_start))


@patch(needed=lambda: True)
def rows_by_epoch(restore: Restore) -> None:
    """NeMo puts the epochs over a file in a random order, with the unfinished last one anywhere among them.

    So which rows a step sees depends on `max_steps`, and a run that goes on for longer sees some twice and some never.
    Epochs come one after the other, each shuffled as before. (Files of more than a million rows are shuffled in blocks
    that are no epochs; they stay as they are.)
    """
    from nemo.collections.nlp.data.language_modeling.text_memmap_dataset import OnlineSampleMapping

    stock = OnlineSampleMapping.__init__

    @wraps(stock)
    def init(self, dataset_size, num_samples, block_size=1_000_000, *args, **kwargs):
        if block_size is not None and block_size < dataset_size:
            return stock(self, dataset_size, num_samples, block_size, *args, **kwargs)
        epochs = -(-num_samples // dataset_size)
        stock(self, dataset_size, epochs * dataset_size, block_size, *args, **kwargs)
        self.num_samples = num_samples
        self.block_idx_list.sort()

    restore.set(OnlineSampleMapping, "__init__", init)


@patch(needed=lambda: True)
def generation_without_dropout(restore: Restore) -> None:
    """Validation puts the model back to training after the loss, and then generates text for the metric: with dropout.

    A model generates in evaluation mode, whatever it was in before.
    """
    from nemo.collections.nlp.models.language_modeling.megatron_gpt_sft_model import MegatronGPTSFTModel

    stock = MegatronGPTSFTModel.predict_step

    @wraps(stock)
    def predict_step(self, *args, **kwargs):
        training = [module for module in self.modules() if module.training]
        self.eval()
        try:
            return stock(self, *args, **kwargs)
        finally:
            for module in training:
                module.training = True

    restore.set(MegatronGPTSFTModel, "predict_step", predict_step)


@patch(needed=lambda: True)
def pieces_of_a_batch(restore: Restore) -> None:
    """Every data-parallel rank takes each n-th row, so micro-batches consist of other rows than in one process.

    A step's loss is the mean of its micro-batches' mean losses, in which tokens then weigh otherwise: another curve for
    every number of ranks. They take each n-th micro-batch of the one process.
    """
    from nemo.collections.nlp.data.language_modeling.megatron.megatron_batch_samplers import (
        MegatronPretrainingBatchSampler,
    )

    stock = MegatronPretrainingBatchSampler.__iter__

    @wraps(stock)
    def batches(self):
        if not (self.drop_last or self.pad_samples_to_global_batch_size):  # the last batch has no such pieces
            yield from stock(self)
            return
        size, ranks, piece = self._global_batch_size, self.data_parallel_size, self.micro_batch_size
        mine = [row for row in range(size) if row // piece % ranks == self.data_parallel_rank]
        for start in range(self.consumed_samples % self.total_samples, self.total_samples, size):
            batch = list(range(start, min(start + size, self.total_samples)))
            if len(batch) < size and self.drop_last:
                return
            batch += [-1] * (size - len(batch))
            yield [batch[row] for row in mine]

    restore.set(MegatronPretrainingBatchSampler, "__iter__", batches)


@patch(needed=lambda: True)
def generation_without_recomputation(restore: Restore) -> None:
    """Generation refuses a model that recomputes activations; NeMo's own loops switch that off around evaluation only.

    It is off while text is generated, wherever that is asked for: without gradients there is nothing to recompute for.
    """
    from nemo.collections.nlp.models.language_modeling.megatron_gpt_sft_model import MegatronGPTSFTModel

    stock = MegatronGPTSFTModel.predict_step

    @wraps(stock)
    def predict_step(self, *args, **kwargs):
        if self.cfg.activations_checkpoint_granularity is None:
            return stock(self, *args, **kwargs)
        self._reset_activation_checkpointing_args()
        try:
            return stock(self, *args, **kwargs)
        finally:
            self._restore_activation_checkpointing_args()

    restore.set(MegatronGPTSFTModel, "predict_step", predict_step)
