"""What stands in for Transformer Engine: megatron-core's own ("local") layers."""

from __future__ import annotations

from functools import wraps
from importlib import metadata

from nemo_tiedlora.platform.patch import Restore, missing, patch

no_transformer_engine = missing("transformer_engine")


@patch(needed=no_transformer_engine)
def transformer_engine_layers(restore: Restore) -> None:
    """NeMo builds every layer spec it knows to pick one, among them Transformer Engine's: a NameError without it."""
    from megatron.core.models.gpt.gpt_layer_specs import get_gpt_layer_local_spec
    from nemo.collections.nlp.models.language_modeling import megatron_gpt_model

    @wraps(megatron_gpt_model.get_specs)
    def get_specs(spec_name, transformer_config=None, use_te=True, hyena_cfg=None, fp8=False):
        if fp8 or spec_name not in ("", "te_gpt"):
            raise ValueError(
                f"model.name={spec_name!r} with fp8={fp8} needs Transformer Engine, which is not installed"
            )
        return get_gpt_layer_local_spec(
            num_experts=transformer_config.num_moe_experts,
            moe_grouped_gemm=transformer_config.moe_grouped_gemm,
            qk_layernorm=transformer_config.qk_layernorm,
            normalization=transformer_config.normalization,
        )

    restore.set(megatron_gpt_model, "get_specs", get_specs)


@patch(needed=no_transformer_engine)
def local_layers_process_groups(restore: Restore) -> None:
    """megatron-core's own layers want process groups when they are built; NeMo starts them after the model is.

    They are started where NeMo has just fixed the parallel layout, in the way it does before it loads a checkpoint.
    """
    from megatron.core import parallel_state
    from nemo.collections.nlp.models.language_modeling.megatron_base_model import MegatronBaseModel

    stock = MegatronBaseModel.__init__

    @wraps(stock)
    def init(self, cfg, trainer, no_lm_init=True):
        stock(self, cfg, trainer, no_lm_init)
        if not parallel_state.is_initialized():
            if trainer.strategy.launcher is not None:
                trainer.strategy.launcher.launch(lambda: None, trainer=trainer)
            trainer.strategy.setup_environment()

    restore.set(MegatronBaseModel, "__init__", init)


@patch(needed=no_transformer_engine)
def expert_router(restore: Restore) -> None:
    """The router of a model of experts asks whether Transformer Engine's product is None: a NameError without it.

    None is the answer for "there is none": it multiplies with torch.
    """
    from megatron.core.transformer.moe import moe_utils

    restore.set(moe_utils, "te_general_gemm", None)


@patch(needed=no_transformer_engine)
def sequence_parallel_adapters(restore: Restore) -> None:
    """Adapters under sequence parallelism ask for Transformer Engine's version, which is an error without it.

    Version 0 is the answer for "its layers do not gather their norm's output": the adapter has to.
    """
    from nemo.collections.nlp.modules.common.megatron.adapters.parallel_adapters import ParallelLinearAdapter

    stock = ParallelLinearAdapter.__init__
    version = metadata.version

    @wraps(stock)
    def init(self, *args, **kwargs):
        with Restore() as around:
            around.set(metadata, "version", lambda name: "0" if name == "transformer-engine" else version(name))
            stock(self, *args, **kwargs)

    restore.set(ParallelLinearAdapter, "__init__", init)
