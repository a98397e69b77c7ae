"""What stands in for torchvision: nothing, for models that do not look at pictures."""

from __future__ import annotations

from functools import wraps

from nemo_tiedlora.platform.patch import Restore, missing, patch


@patch(needed=missing("torchvision"))
def generation_strategy(restore: Restore) -> None:
    """`generate()` imports the picture-reading NeVA model, hence torchvision, to rule out that a GPT is one."""
    from nemo.collections.nlp.modules.common import text_generation_strategy, text_generation_utils

    dispatch = text_generation_strategy.model_inference_strategy_dispatcher

    @wraps(dispatch)
    def strategy_for(model, **args):
        from nemo.collections.nlp.models.language_modeling.megatron_gpt_model import MegatronGPTModel

        if isinstance(model, MegatronGPTModel):
            return text_generation_strategy.GPTModelTextGenerationStrategy(model)
        return dispatch(model, **args)

    restore.set(text_generation_strategy, "model_inference_strategy_dispatcher", strategy_for)
    restore.set(text_generation_utils, "model_inference_strategy_dispatcher", strategy_for)
