"""Toy models and data for tests, built by NeMo itself: a GPT-2B-like and a Llama-like base, a tokenizer, sums to learn.

Everything here runs inside `nemo_tiedlora.platform.host()` and imports NeMo only when called.
"""

from __future__ import annotations

import json
import os
import random
from contextlib import contextmanager
from pathlib import Path

VOCABULARY = 384

#: For processes of their own: one thread, and not this process's rendezvous, whose port is taken, nor its make.
OURS = {"MASTER_ADDR", "MASTER_PORT", "MAKEFLAGS", "MAKELEVEL", "MFLAGS"}
FRESH = {name: value for name, value in os.environ.items() if name not in OURS}
FRESH["OMP_NUM_THREADS"] = "1"
OPTIM = dict(
    name="adamw",
    lr=1e-2,
    weight_decay=0.01,
    betas=[0.9, 0.98],
    sched=dict(name="CosineAnnealing", warmup_steps=2, constant_steps=0, min_lr=0.0),
)


def tokenizer(path: Path) -> Path:
    """Train a sentencepiece tokenizer on sums; return its model file, `path`/tokenizer.model."""
    import sentencepiece

    path.mkdir(parents=True, exist_ok=True)
    corpus = path / "corpus.txt"
    corpus.write_text("\n".join(f"what is {a} plus {b}? the answer is {a + b}." for a in range(100) for b in range(20)))
    sentencepiece.SentencePieceTrainer.train(
        input=str(corpus),
        model_prefix=str(path / "tokenizer"),
        vocab_size=VOCABULARY,
        model_type="bpe",
        byte_fallback=True,
        hard_vocab_limit=False,
        pad_id=3,
        minloglevel=2,
    )
    return path / "tokenizer.model"


def sums(path: Path, count: int, seed: int = 0) -> Path:
    """Write `count` questions with answers as a JSON-lines file."""
    draw = random.Random(seed)
    pairs = [(draw.randint(0, 9), draw.randint(0, 9)) for _ in range(count)]
    rows = [dict(input=f"what is {a} plus {b}?", output=f"{a + b}") for a, b in pairs]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def rows(folder: Path) -> dict[str, Path]:
    """Training and validation rows, as files in a folder."""
    return {"train": sums(folder / "train.jsonl", 200), "validation": sums(folder / "validation.jsonl", 8, seed=1)}


def gpt_config(tokenizer_model: Path, **overrides):
    """A GPT-2B-like model: zero-centered layer norm, no bias, SwiGLU, half rotary, untied embeddings."""
    from omegaconf import OmegaConf

    config = dict(
        mcore_gpt=True,
        transformer_engine=False,
        micro_batch_size=2,
        global_batch_size=4,
        rampup_batch_size=None,
        tensor_model_parallel_size=1,
        pipeline_model_parallel_size=1,
        virtual_pipeline_model_parallel_size=None,
        encoder_seq_length=64,
        max_position_embeddings=64,
        num_layers=4,
        hidden_size=32,
        ffn_hidden_size=64,
        num_attention_heads=4,
        kv_channels=None,
        num_query_groups=None,
        # Large enough for a random base to have something to adapt.
        init_method_std=0.1,
        use_scaled_init_method=True,
        hidden_dropout=0.0,
        attention_dropout=0.0,
        ffn_dropout=0.0,
        normalization="layernorm1p",
        layernorm_epsilon=1e-5,
        bias=False,
        activation="fast-swiglu",
        apply_query_key_layer_scaling=False,
        make_vocab_size_divisible_by=8,
        pre_process=True,
        post_process=True,
        persist_layer_norm=True,
        headscale=False,
        transformer_block_type="pre_ln",
        position_embedding_type="rope",
        rotary_percentage=0.5,
        share_embeddings_and_output_weights=False,
        tokenizer=dict(
            library="sentencepiece",
            type=None,
            model=str(tokenizer_model),
            vocab_file=None,
            merge_file=None,
            delimiter=None,
            sentencepiece_legacy=False,
        ),
        precision=32,
        megatron_amp_O2=False,
        gradient_accumulation_fusion=False,
        bias_activation_fusion=True,
        bias_dropout_add_fusion=True,
        masked_softmax_fusion=True,
        apply_rope_fusion=False,
        seed=1234,
        use_cpu_initialization=True,
        gradient_as_bucket_view=True,
        sequence_parallel=False,
        fp8=False,
        data=dict(
            data_prefix=None,
            data_impl="mock",
            splits_string="900,50,50",
            seq_length=64,
            num_workers=0,
            dataloader_type="single",
        ),
        nsys_profile=dict(enabled=False),
        optim=OPTIM,
    )
    return OmegaConf.create(config | overrides)


def llama_config(tokenizer_model: Path, **overrides):
    """A Llama-like model: RMS norm, SwiGLU, rotary, two query groups, untied embeddings."""
    llama = dict(normalization="rmsnorm", rotary_percentage=1.0, num_query_groups=2)
    return gpt_config(tokenizer_model, **(llama | overrides))


def trainer(model_config, **overrides):
    """A trainer from NeMo's own builder, with the settings of its fine-tuning configuration."""
    from nemo.collections.nlp.parts.megatron_trainer_builder import MegatronLMPPTrainerBuilder
    from omegaconf import OmegaConf

    settings = dict(
        devices=model_config.tensor_model_parallel_size * model_config.pipeline_model_parallel_size,
        num_nodes=1,
        accelerator="gpu",
        precision=32,
        logger=False,
        enable_checkpointing=False,
        use_distributed_sampler=False,
        max_epochs=9999,
        max_steps=20,
        log_every_n_steps=1,
        val_check_interval=20,
        gradient_clip_val=1.0,
        enable_progress_bar=False,
    )
    config = OmegaConf.create(dict(trainer=settings | overrides, exp_manager=dict(log_tflops_per_sec_per_gpu=False)))
    config.model = model_config
    return MegatronLMPPTrainerBuilder(config).create_trainer()


def save_base(config, path: Path) -> Path:
    """Build the model with random weights and save it as a `.nemo` file."""
    from nemo.collections.nlp.models.language_modeling.megatron_gpt_model import MegatronGPTModel

    MegatronGPTModel(config, trainer(config)).save_to(str(path))
    return path


def _dataset(file: Path, name: str, seed: int = 1234):
    common = dict(
        file_names=[str(file)],
        global_batch_size=4,
        micro_batch_size=2,
        shuffle=name == "train",
        num_workers=0,
        memmap_workers=1,
        pin_memory=False,
        max_seq_length=48,
        min_seq_length=1,
        drop_last=name == "train",
        label_key="output",
        add_eos=True,
        add_sep=False,
        add_bos=False,
        truncation_field="input",
        index_mapping_dir=None,
        prompt_template="{input} {output}",
        truncation_method="right",
        global_sample_mapping=False,
    )
    if name == "train":
        return common | dict(concat_sampling_probabilities=[1.0])
    return common | dict(
        names=[name],
        write_predictions_to_file=False,
        output_file_path_prefix=None,
        tokens_to_generate=4,
        metric=dict(name="exact_string_match", average=None, num_classes=None),
    )


def finetuning_config(base: Path, train: Path, validation: Path, peft: dict, **overrides):
    """The configuration of NeMo's fine-tuning script for a toy base; `overrides` go to the model section."""
    from omegaconf import OmegaConf

    model = dict(
        seed=1234,
        tensor_model_parallel_size=1,
        pipeline_model_parallel_size=1,
        global_batch_size=4,
        micro_batch_size=2,
        restore_from_path=str(base),
        resume_from_checkpoint=None,
        save_nemo_on_validation_end=False,
        sync_batch_comm=False,
        megatron_amp_O2=False,
        sequence_parallel=False,
        activations_checkpoint_granularity=None,
        activations_checkpoint_method=None,
        activations_checkpoint_num_layers=None,
        activations_checkpoint_layers_per_pipeline=None,
        answer_only_loss=True,
        gradient_as_bucket_view=False,
        hidden_dropout=0.0,
        attention_dropout=0.0,
        ffn_dropout=0.0,
        peft=dict(restore_from_path=None) | peft,
        data=dict(chat=False, train_ds=_dataset(train, "train"), validation_ds=_dataset(validation, "validation")),
        optim=OPTIM,
    )
    return OmegaConf.create(dict(trainer=dict(precision=32), model=model | overrides))


def finetuning_model(config, trainer_, load=None):
    """Restore the base as NeMo's fine-tuning script does and add the scheme's adapters, or `load` saved ones."""
    from nemo.collections.nlp.models.language_modeling.megatron_gpt_sft_model import MegatronGPTSFTModel
    from nemo.collections.nlp.parts.peft_config import PEFT_CONFIG_MAP
    from omegaconf import open_dict

    base = config.model.restore_from_path
    model_config = MegatronGPTSFTModel.merge_cfg_with(base, config)
    with open_dict(model_config):
        model_config.precision = config.trainer.precision
    model = MegatronGPTSFTModel.restore_from(base, model_config, trainer=trainer_)
    if load is not None:
        model.load_adapters(str(load))
        return model
    schemes = [PEFT_CONFIG_MAP[name] for name in config.model.peft.peft_scheme.split(",")]
    if None not in schemes:
        model.add_adapter([scheme(model_config) for scheme in schemes])
    return model


@contextmanager
def clean_megatron():
    """Leave no process group, parallel layout or microbatch count behind: all three are global to the process."""
    import torch
    from megatron.core import num_microbatches_calculator, parallel_state
    from nemo.utils import AppState

    before = dict(vars(AppState()))
    try:
        yield
    finally:
        parallel_state.destroy_model_parallel()
        num_microbatches_calculator.destroy_num_microbatches_calculator()
        if torch.distributed.is_initialized():
            torch.distributed.destroy_process_group()
        vars(AppState()).clear()
        vars(AppState()).update(before)


@contextmanager
def one_process_world(folder: Path):
    """One process as a whole Megatron world: gloo over a file in a fresh folder, so that no port can be taken."""
    import torch
    from megatron.core import parallel_state, tensor_parallel

    with clean_megatron():
        torch.distributed.init_process_group("gloo", init_method=f"file://{folder}/store", rank=0, world_size=1)
        parallel_state.initialize_model_parallel()
        tensor_parallel.model_parallel_cuda_manual_seed(1234)
        yield


def finetune(config, **trainer_settings):
    """Fine-tune as NeMo's script does; return the model, its trainer and the loss of every step."""
    import lightning.pytorch as pl

    class Losses(pl.Callback):
        def __init__(self):
            self.values = []

        def on_train_batch_end(self, trainer, *args):
            self.values.append(float(trainer.callback_metrics["reduced_train_loss"]))

    trainer_ = trainer(config.model, **dict(precision=config.trainer.precision) | trainer_settings)
    losses = Losses()
    trainer_.callbacks.append(losses)
    model = finetuning_model(config, trainer_)
    trainer_.fit(model)
    return model, trainer_, losses.values


LORA = dict(
    variant="nemo",
    target_modules=["attention_qkv"],
    adapter_dim=8,
    alpha=8,
    adapter_dropout=0.0,
    column_init_method="xavier",
    row_init_method="zero",
    layer_selection=None,
    weight_tying=False,
    position_embedding_strategy=None,
)
ADAPTER = dict(
    type="parallel_adapter",
    adapter_dim=8,
    adapter_dropout=0.0,
    norm_position="pre",
    norm_type="mixedfusedlayernorm",
    column_init_method="xavier",
    row_init_method="zero",
    layer_selection=None,
    weight_tying=False,
    position_embedding_strategy=None,
)
ALL_TARGETS = ["attention_qkv", "attention_dense", "mlp_fc1", "mlp_fc2"]
STOCK_SCHEMES = {
    "lora": dict(peft_scheme="lora", lora_tuning=LORA),
    "lora-all": dict(peft_scheme="lora", lora_tuning=LORA | dict(target_modules=ALL_TARGETS)),
    "lora-canonical": dict(
        peft_scheme="lora", lora_tuning=LORA | dict(target_modules=ALL_TARGETS, variant="canonical")
    ),
    "adapter": dict(peft_scheme="adapter", adapter_tuning=ADAPTER),
    "ia3": dict(peft_scheme="ia3", ia3_tuning=dict(layer_selection=None)),
    "ptuning": dict(
        peft_scheme="ptuning", p_tuning=dict(virtual_tokens=4, bottleneck_dim=16, embedding_dim=16, init_std=0.023)
    ),
    "none": dict(peft_scheme="none"),
}
