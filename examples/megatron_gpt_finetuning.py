"""Fine-tune a NeMo GPT with Tied-LoRA or any other scheme.

python examples/megatron_gpt_finetuning.py model.peft.peft_scheme=tied_lora
"""

from pathlib import Path

from nemo_tiedlora.job.script import hydra_script

CONF = Path(__file__).parent.parent / "conf"


@hydra_script(CONF, "megatron_gpt_finetuning_config")
def main(cfg):
    from nemo_tiedlora.job.finetune import finetune

    finetune(cfg)


if __name__ == "__main__":
    main()
