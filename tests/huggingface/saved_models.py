"""Small random models of every family, as transformers itself saves them, with a tokenizer that has a chat template."""

import torch
import transformers
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers

TOKENS = 331
TEMPLATE = (
    "{% for message in messages %}<|im_start|>{{ message.role }}\n{{ message.content }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
SIZES = {
    "vocab_size": 336, "hidden_size": 48, "intermediate_size": 80, "num_hidden_layers": 3, "num_attention_heads": 6,
    "num_key_value_heads": 2, "max_position_embeddings": 256, "bos_token_id": 1, "eos_token_id": 2,
    "initializer_range": 0.2,
}  # fmt: skip
GPT2_SIZES = {
    "vocab_size": 336, "n_embd": 48, "n_layer": 3, "n_head": 6, "n_positions": 256, "bos_token_id": 1,
    "eos_token_id": 2, "initializer_range": 0.2,
}  # fmt: skip
LLAMA3 = {
    "rope_type": "llama3", "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0,
    "original_max_position_embeddings": 32,
}  # fmt: skip
#: Name → class of the config, and what it has besides the sizes.
MODELS = {
    "llama": (transformers.LlamaConfig, {}),
    "llama 3": (
        transformers.LlamaConfig, {"tie_word_embeddings": True, "rope_theta": 500000.0, "rope_scaling": LLAMA3},
    ),
    "linear rope": (transformers.LlamaConfig, {"rope_scaling": {"rope_type": "linear", "factor": 2.0}}),
    "full vocabulary": (transformers.LlamaConfig, {"vocab_size": TOKENS, "num_key_value_heads": 6}),
    "mistral": (transformers.MistralConfig, {"sliding_window": None, "head_dim": 16}),
    "qwen2": (transformers.Qwen2Config, {"rope_theta": 1e6}),
    "qwen3": (transformers.Qwen3Config, {"head_dim": 16, "tie_word_embeddings": True}),
    "gemma": (transformers.GemmaConfig, {"head_dim": 16, "num_key_value_heads": 1}),
    "gpt2": (transformers.GPT2Config, {}),
    "gpt2 with gelu": (
        transformers.GPT2Config, {"activation_function": "gelu", "n_inner": 80, "tie_word_embeddings": False},
    ),
}  # fmt: skip


def tokenizer(folder):
    """Save a tokenizer of ``TOKENS`` tokens into ``folder``."""
    bytes_ = pre_tokenizers.ByteLevel(add_prefix_space=False)
    made = Tokenizer(models.BPE())
    made.pre_tokenizer, made.decoder = bytes_, decoders.ByteLevel()
    special = ["<unk>", "<s>", "</s>", "<|im_start|>", "<|im_end|>"]
    trainer = trainers.BpeTrainer(
        vocab_size=TOKENS, special_tokens=special, initial_alphabet=bytes_.alphabet(), show_progress=False
    )
    made.train_from_iterator([f"what is {a} plus {b}? it is {a + b}." for a in range(50) for b in range(20)], trainer)
    wrapped = transformers.PreTrainedTokenizerFast(
        tokenizer_object=made,
        unk_token="<unk>",
        bos_token="<s>",
        eos_token="</s>",
        additional_special_tokens=["<|im_start|>", "<|im_end|>"],
    )
    wrapped.chat_template = TEMPLATE
    wrapped.save_pretrained(folder)
    return wrapped


def config(name, **changed):
    """The config of a model of ``MODELS``."""
    kind, own = MODELS[name]
    return kind(**(GPT2_SIZES if kind is transformers.GPT2Config else SIZES) | own | changed)


def save(folder, name, dtype=torch.float32, shards="5GB", **changed):
    """Save a random model, norms and biases included, and its tokenizer into ``folder``; return the model."""
    torch.manual_seed(0)
    model = transformers.AutoModelForCausalLM.from_config(config(name, **changed)).to(dtype)
    norms = ("norm.weight", "ln_1.weight", "ln_2.weight", "ln_f.weight")
    around_one = () if name == "gemma" else norms  # Gemma keeps them minus one
    with torch.no_grad():
        for parameter_name, parameter in model.named_parameters():
            if parameter.dim() == 1:
                parameter.copy_(0.3 * torch.randn_like(parameter) + parameter_name.endswith(around_one))
    model.save_pretrained(folder, max_shard_size=shards)
    tokenizer(folder)
    return model.eval()
