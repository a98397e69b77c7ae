"""Adds a LoRA of NeMo's own to the weights of its base, with NeMo's calls alone, as NVIDIA's merge script does."""

import tempfile

import torch
from lightning.pytorch import Trainer
from nemo.collections.nlp.models.language_modeling.megatron_gpt_model import MegatronGPTModel
from nemo.collections.nlp.parts.nlp_overrides import NLPDDPStrategy, NLPSaveRestoreConnector
from nemo.core.config import hydra_runner
from omegaconf import open_dict


@hydra_runner(config_path="conf", config_name="merge")
def main(cfg):
    trainer = Trainer(strategy=NLPDDPStrategy(), **cfg.trainer)
    settings = MegatronGPTModel.restore_from(cfg.gpt_model_file, trainer=trainer, return_config=True)
    with open_dict(settings):
        settings.use_cpu_initialization = cfg.trainer.accelerator == "cpu"
    model = MegatronGPTModel.restore_from(cfg.gpt_model_file, override_config_path=settings, trainer=trainer)
    with tempfile.TemporaryDirectory() as folder:
        NLPSaveRestoreConnector._unpack_nemo_file(cfg.lora_model_path, folder)
        lora = torch.load(f"{folder}/model_weights.ckpt", map_location="cpu")
    weights = model.state_dict()
    for layer in range(model.cfg.num_layers):
        inside = f"model.decoder.layers.{layer}.self_attention"
        A, B = (lora[f"{inside}.adapter_layer.lora_kqv_adapter.linear_{end}.weight"] for end in ("in", "out"))
        weights[f"{inside}.linear_qkv.weight"] += B @ A
    model.load_state_dict(weights)
    model.save_to(cfg.merged_model_path)


if __name__ == "__main__":
    main()
