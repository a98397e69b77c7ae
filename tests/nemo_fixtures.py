"""Fixtures: NeMo itself, entered once per file, toy bases saved by it, and models with adapters on them."""

import pytest
import toy

from nemo_tiedlora import platform, register


@pytest.fixture(scope="module")
def host():
    with platform.host() as entered, toy.clean_megatron():
        register()
        yield entered


@pytest.fixture(scope="module")
def files(host, tmp_path_factory):
    """Training and validation rows, and a random Llama-like and GPT-2B-like base."""
    folder = tmp_path_factory.mktemp("toy")
    tokenizer = toy.tokenizer(folder)
    return toy.rows(folder) | {
        "llama": toy.save_base(toy.llama_config(tokenizer), folder / "llama.nemo"),
        "gpt": toy.save_base(toy.gpt_config(tokenizer), folder / "gpt.nemo"),
    }


@pytest.fixture
def finetuning(files, tmp_path):
    """Builds a model with an adapter on a toy base: ``finetuning("llama", peft_scheme=...)`` → (model, trainer)."""

    def make(base="llama", trainer=None, model=None, **peft):
        config = toy.finetuning_config(files[base], files["train"], files["validation"], peft, **(model or {}))
        for split in ("train_ds", "validation_ds"):
            config.model.data[split].index_mapping_dir = str(tmp_path)
        config.model.data.validation_ds.metric.name = "loss"
        settings = {"max_steps": 20, "precision": 32} | (trainer or {})
        run = toy.trainer(config.model, num_sanity_val_steps=0, val_check_interval=settings["max_steps"], **settings)
        config.trainer.precision = settings["precision"]
        return toy.finetuning_model(config, run), run

    return make
