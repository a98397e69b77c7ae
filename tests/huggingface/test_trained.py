"""A base of another family is trained like any other: adapters, merging, pipelines; and the way back has it all."""

import json
from pathlib import Path

import forked
import pytest
import torch
import toy
import transformers
from safetensors.torch import load_file
from saved_models import TOKENS, save

from nemo_tiedlora.checkpoint.merge import merge
from nemo_tiedlora.errors import UsageError
from nemo_tiedlora.huggingface.given_back import give_back
from nemo_tiedlora.huggingface.taken_over import take_over
from nemo_tiedlora.job.generate import generator

TESTS = Path(__file__).parents[1]
WATCHED = TESTS / "examples" / "watched.py"
SCRIPT = TESTS.parent / "examples" / "megatron_gpt_finetuning.py"


def finetuned(folder, base, layout="one process", processes=1, *overrides):
    """Train TL6 on all targets for two steps; return the losses and the adapter's file."""
    runs = folder / layout
    runs.mkdir()
    group = forked.torchrun(
        processes, WATCHED, "-", "-", SCRIPT, f"model.restore_from_path={base}", f"trainer.devices={processes}",
        "trainer.max_steps=2", "trainer.val_check_interval=2", "exp_manager.exp_dir=runs",
        "model.global_batch_size=8", "model.micro_batch_size=2", "model.data.train_ds.max_seq_length=64",
        f"model.data.train_ds.file_names=[{toy.sums(folder / 'train.jsonl', 64)}]",
        f"model.data.validation_ds.file_names=[{toy.sums(folder / 'validation.jsonl', 4, seed=1)}]",
        "model.peft.peft_scheme=tied_lora", "model.peft.tied_lora_tuning.preset=TL6",
        "model.peft.tied_lora_tuning.target_modules=[all]", "model.optim.lr=0.05", "model.optim.sched.warmup_steps=0",
        *overrides, cwd=runs,
    )  # fmt: skip
    for rank in group:
        code, _, err = rank.finish()
        assert code == 0, err[-3000:]
    (summary,) = runs.glob("runs/*/summary.json")
    losses = [json.loads((runs / f"watched-{rank}.json").read_text())["losses"] for rank in range(processes)]
    return losses, runs / json.loads(summary.read_text())["adapter"]


@pytest.mark.parametrize("name", ["gemma", "gpt2"])
def test_transformers_computes_the_merged_model(name, tmp_path):
    before = save(tmp_path / "saved", name)
    take_over(tmp_path / "saved", tmp_path / "base.nemo")
    _, adapter = finetuned(tmp_path, tmp_path / "base.nemo")
    with pytest.raises(UsageError, match="an adapter, not a base"):
        give_back(adapter, tmp_path / "out")
    merge(tmp_path / "base.nemo", adapter, tmp_path / "merged.nemo")
    give_back(tmp_path / "merged.nemo", tmp_path / "out")
    merged = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "out").eval()
    ids = torch.randint(TOKENS, (2, 50), generator=torch.Generator().manual_seed(1))
    with toy.clean_megatron(), generator(tmp_path / "base.nemo", adapter) as loaded, torch.no_grad():
        logits = loaded.model.model(ids.cuda(), torch.arange(50).expand_as(ids).cuda(), None).cpu()
        assert (logits - before(ids).logits).abs().max() > 0.1
        torch.testing.assert_close(logits, merged(ids).logits, atol=1e-4, rtol=1e-4)


@pytest.mark.thorough
@pytest.mark.parametrize("name", ["llama 3", "gemma", "gpt2"])
def test_pipeline_and_tensor_ranks_train_the_same(name, tmp_path):
    size = "n_layer" if name == "gpt2" else "num_hidden_layers"
    changed = {} if name == "gpt2" else {"num_key_value_heads": 2}
    save(tmp_path / "saved", name, **{size: 4}, **changed)
    take_over(tmp_path / "saved", tmp_path / "base.nemo")
    (alone,), _ = finetuned(tmp_path, tmp_path / "base.nemo")
    assert alone["0"] != pytest.approx(alone["1"], rel=1e-3)
    for layout in ("pipeline", "tensor"):
        ranks, _ = finetuned(tmp_path, tmp_path / "base.nemo", layout, 2, f"model.{layout}_model_parallel_size=2")
        for losses in ranks:
            assert losses == pytest.approx(alone, rel=1e-4), layout


@pytest.mark.thorough
@pytest.mark.parametrize("layout", ["pipeline", "tensor"])
@pytest.mark.parametrize("name", ["qwen2", "gemma", "gpt2"])
def test_what_nemo_saved_in_parts_comes_back_bit_by_bit(name, layout, tmp_path):
    """With the rows that NeMo adds to the vocabulary for several ranks."""
    save(tmp_path / "saved", name, vocab_size=TOKENS, **{"n_layer" if name == "gpt2" else "num_hidden_layers": 4},
         **({} if name == "gpt2" else {"num_key_value_heads": 2}))  # fmt: skip
    take_over(tmp_path / "saved", tmp_path / "base.nemo")
    forked.ranks(2, _saved_again, tmp_path, layout)
    give_back(tmp_path / "parts.nemo", tmp_path / "out")
    before, after = (load_file(tmp_path / folder / "model.safetensors") for folder in ("saved", "out"))
    assert after.keys() == before.keys() and all(torch.equal(after[key], before[key]) for key in before)
    assert (tmp_path / "out" / "tokenizer.json").read_bytes() == (tmp_path / "saved" / "tokenizer.json").read_bytes()


def _saved_again(folder, layout):
    from nemo.collections.nlp.models.language_modeling.megatron_gpt_model import MegatronGPTModel
    from omegaconf import open_dict

    from nemo_tiedlora import platform

    path = str(folder / "base.nemo")
    with platform.host():
        config = MegatronGPTModel.restore_from(path, return_config=True)
        with open_dict(config):
            config[f"{layout}_model_parallel_size"] = 2
        model = MegatronGPTModel.restore_from(path, override_config_path=config, trainer=toy.trainer(config))
        model.save_to(str(folder / "parts.nemo"))
