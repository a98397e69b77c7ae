"""Fine-tunes with NeMo's calls alone, as NVIDIA's scripts do; it knows nothing of any scheme that is not NeMo's."""

from nemo.collections.nlp.models.language_modeling.megatron_gpt_sft_model import MegatronGPTSFTModel
from nemo.collections.nlp.parts.megatron_trainer_builder import MegatronLMPPTrainerBuilder
from nemo.collections.nlp.parts.peft_config import PEFT_CONFIG_MAP
from nemo.core.config import hydra_runner
from nemo.utils.exp_manager import exp_manager


@hydra_runner(config_path="conf", config_name="finetuning")
def main(cfg):
    trainer = MegatronLMPPTrainerBuilder(cfg).create_trainer()
    exp_manager(trainer, cfg.exp_manager)
    settings = MegatronGPTSFTModel.merge_cfg_with(cfg.model.restore_from_path, cfg)
    model = MegatronGPTSFTModel.restore_from(cfg.model.restore_from_path, settings, trainer=trainer)
    scheme = PEFT_CONFIG_MAP[cfg.model.peft.peft_scheme]
    if cfg.model.peft.restore_from_path is not None:
        model.load_adapters(cfg.model.peft.restore_from_path, scheme(settings))
    elif scheme is not None:
        model.add_adapter(scheme(settings))
    if cfg.fail:
        raise LookupError("the script's own")
    trainer.fit(model)


if __name__ == "__main__":
    main()
