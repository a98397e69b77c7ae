"""The built-in base: a small Llama-like model, packed from the weights that come with this package.

    from nemo_tiedlora.embedded.base import base

    path = base()        # a `.nemo` file in the user's cache folder

`nemo_tiedlora.job.pretrain` made the weights and the tokenizer.
"""

from __future__ import annotations

import io
import os
import tarfile
from hashlib import sha256
from pathlib import Path
from typing import Any

from nemo_tiedlora.errors import UsageError
from nemo_tiedlora.files import cache_folder, write_bytes

FOLDER = Path(__file__).parent
WEIGHTS, TOKENIZER = "base.safetensors", "tokenizer.model"
#: SHA-256 of the files that come with this package.
SHA256 = {
    WEIGHTS: "3b7f1b1b10d1a8d2cba7587ec09a04f7e17b510c0763d60e134ddc43f8a6a10e",
    TOKENIZER: "5832e4b62e5c17e0aa9979cfbbf5bc8b9a3cca105d21e5c55278c9ef7b82c40a",
}

MODEL = dict(
    mcore_gpt=True,
    transformer_engine=False,
    num_layers=4,
    hidden_size=64,
    ffn_hidden_size=128,
    num_attention_heads=4,
    num_query_groups=2,
    kv_channels=None,
    encoder_seq_length=512,
    max_position_embeddings=512,
    normalization="rmsnorm",
    layernorm_epsilon=1e-5,
    bias=False,
    activation="fast-swiglu",
    position_embedding_type="rope",
    rotary_percentage=1.0,
    share_embeddings_and_output_weights=False,
    make_vocab_size_divisible_by=16,  # 704 rows at every tensor-parallel size: added ones would weigh in the loss
    init_method_std=0.02,
    use_scaled_init_method=True,
    hidden_dropout=0.0,
    attention_dropout=0.0,
    ffn_dropout=0.0,
    transformer_block_type="pre_ln",
    apply_query_key_layer_scaling=False,
    persist_layer_norm=False,
    headscale=False,
    pre_process=True,
    post_process=True,
    micro_batch_size=1,
    global_batch_size=1,
    rampup_batch_size=None,
    tensor_model_parallel_size=1,
    pipeline_model_parallel_size=1,
    virtual_pipeline_model_parallel_size=None,
    sequence_parallel=False,
    precision=32,
    megatron_amp_O2=False,
    fp8=False,
    gradient_accumulation_fusion=False,
    gradient_as_bucket_view=True,
    bias_activation_fusion=False,
    bias_dropout_add_fusion=False,
    masked_softmax_fusion=False,
    apply_rope_fusion=False,
    use_cpu_initialization=True,
    seed=1234,
    nsys_profile=dict(enabled=False),
    data=dict(
        data_prefix=None,
        data_impl="mock",
        splits_string="900,50,50",
        seq_length=512,
        num_workers=0,
        dataloader_type="single",
    ),
    optim=dict(name="adamw", lr=1e-3, sched=dict(name="CosineAnnealing", warmup_steps=0, constant_steps=0, min_lr=0.0)),
)
#: The class that restores it.
TARGET = "nemo.collections.nlp.models.language_modeling.megatron_gpt_model.MegatronGPTModel"


def base() -> Path:
    """The built-in base as a `.nemo` file, kept under its checksum in the user's cache folder.

    Raises:
        UsageError: a file that came with this package is damaged, or the cache folder cannot be written.
    """
    content = packed()
    try:
        path = cache_folder() / f"base-{sha256(content).hexdigest()[:12]}.nemo"
        # Processes that come here at once write the same bytes.
        if not path.exists() or path.read_bytes() != content:
            write_bytes(path, content)
    except (OSError, RuntimeError) as error:
        way_out = f"the built-in base cannot be kept there ({error}); set it to a folder that can be written"
        raise UsageError("XDG_CACHE_HOME", os.environ.get("XDG_CACHE_HOME"), way_out) from None
    return path


def packed() -> bytes:
    """The built-in base as a `.nemo` file: with one version of PyTorch, the same bytes on every machine.

    Raises:
        UsageError: a file that came with this package is damaged.
    """
    from safetensors.torch import load

    from nemo_tiedlora.checkpoint.packed import Piece, pack

    weights = load(shipped(WEIGHTS))
    # NeMo tells the files of several models apart by such names.
    tokenizer = f"{SHA256[TOKENIZER][:32]}_{TOKENIZER}"
    config = model_config(f"nemo:{tokenizer}") | dict(target=TARGET)
    content = io.BytesIO()
    with tarfile.open(fileobj=content, mode="w", format=tarfile.GNU_FORMAT) as tar:
        # Weights come in any order.
        pack(tar, config, {tokenizer: shipped(TOKENIZER)}, (Piece(*weight) for weight in sorted(weights.items())))
    return content.getvalue()


def shipped(name: str) -> bytes:
    """A file that came with this package.

    Raises:
        UsageError: it is not there or damaged.
    """
    path = FOLDER / name
    try:
        content = path.read_bytes()
    except OSError as error:
        raise UsageError("base", str(path), f"cannot be read ({error.strerror}); install nemo_tiedlora again") from None
    if sha256(content).hexdigest() != SHA256[name]:
        raise UsageError("base", str(path), "damaged: its SHA-256 is another; install nemo_tiedlora again")
    return content


def model_config(tokenizer: str) -> dict[str, Any]:
    """NeMo's configuration of the model, with the tokenizer as this file."""
    library = dict(library="sentencepiece", type=None, delimiter=None, sentencepiece_legacy=False)
    return MODEL | dict(tokenizer=library | dict(model=tokenizer, vocab_file=None, merge_file=None))
