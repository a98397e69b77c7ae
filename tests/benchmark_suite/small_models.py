"""Small random models of several kinds, with their tokenizer, as transformers saves them."""

import torch
import transformers
from huggingface import saved_models

SIZES = {
    "vocab_size": 336, "hidden_size": 48, "intermediate_size": 80, "num_hidden_layers": 3, "num_attention_heads": 6,
    "max_position_embeddings": 260, "initializer_range": 0.1,
}  # fmt: skip
IDS = {"bos_token_id": 1, "eos_token_id": 2, "pad_token_id": 0}


def save(folder, name):
    """Write the model ``llama``, ``gpt2``, ``roberta``, ``bert``, ``t5`` or ``llava`` into a folder, and return it."""
    torch.manual_seed(0)
    if name in ("llama", "gpt2"):
        saved_models.save(folder, name)
    elif name in ("roberta", "bert"):
        kind = transformers.RobertaConfig if name == "roberta" else transformers.BertConfig
        transformers.AutoModelForMaskedLM.from_config(kind(**SIZES, **IDS)).save_pretrained(folder)
    elif name == "t5":
        config = transformers.T5Config(vocab_size=336, d_model=16, d_kv=4, d_ff=16, num_layers=1, num_heads=2)
        transformers.T5ForConditionalGeneration(config).save_pretrained(folder)
    else:
        vision = transformers.CLIPVisionConfig(
            hidden_size=16, intermediate_size=16, num_hidden_layers=2, num_attention_heads=2, image_size=8, patch_size=4
        )
        text = transformers.LlamaConfig(**saved_models.SIZES)
        config = transformers.LlavaConfig(vision, text, image_token_index=330)
        transformers.LlavaForConditionalGeneration(config).save_pretrained(folder)
    tokenizer = saved_models.tokenizer(folder)
    if name in ("roberta", "bert"):
        tokenizer.pad_token = "<unk>"
        tokenizer.save_pretrained(folder)
    return folder
