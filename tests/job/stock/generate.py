"""Answers rows with a base and an adapter, with NeMo's calls alone, as NVIDIA's scripts do."""

from nemo.collections.nlp.models.language_modeling.megatron_gpt_sft_model import MegatronGPTSFTModel
from nemo.collections.nlp.parts.megatron_trainer_builder import MegatronLMPPTrainerBuilder
from nemo.core.config import hydra_runner
from omegaconf import OmegaConf


@hydra_runner(config_path="conf", config_name="generate")
def main(cfg):
    trainer = MegatronLMPPTrainerBuilder(cfg).create_trainer()
    settings = MegatronGPTSFTModel.merge_inference_cfg(cfg.model.peft.restore_from_path, cfg)
    model = MegatronGPTSFTModel.restore_from(cfg.model.restore_from_path, settings, trainer=trainer)
    model.load_adapters(cfg.model.peft.restore_from_path)
    model.freeze()
    model.set_inference_config(OmegaConf.to_container(cfg.inference, resolve=True))
    trainer.test(model)


if __name__ == "__main__":
    main()
