"""A model that transformers saved, as a base: the same logits and the same text, whatever NeMo does with it."""

import json
import os
import tarfile

import forked
import pytest
import saved_models
import torch
import toy
import transformers
from safetensors.torch import save_file
from saved_models import MODELS, TOKENS, save

from nemo_tiedlora.checkpoint.base import open_base
from nemo_tiedlora.huggingface.families import FAMILIES
from nemo_tiedlora.huggingface.taken_over import Model, base_of, take_over
from nemo_tiedlora.job.generate import generator

PROMPTS = ["what is 3 plus 4?", "<s><|im_start|>user\nwhat is 10 plus 7?<|im_end|>\n<|im_start|>assistant\n"]


def greedy(model, tokenizer, prompt, tokens):
    """What transformers says. NeMo never says a number for which the tokenizer has no token."""
    ids = tokenizer(prompt, add_special_tokens=False, return_tensors="pt").input_ids
    unnamed = list(range(len(tokenizer), model.config.vocab_size))
    said = model.generate(
        ids,
        attention_mask=torch.ones_like(ids),
        max_new_tokens=tokens,
        do_sample=False,
        suppress_tokens=unnamed or None,
        pad_token_id=2,
    )[0, ids.shape[1] :].tolist()
    said = said[: [*said, 2].index(2)]
    return tokenizer.decode(said, skip_special_tokens=True)


def test_every_family_is_among_the_models():
    made = {saved_models.config(name).model_type for name in MODELS}
    assert made == {family.kind for family in FAMILIES.values()}


@pytest.mark.parametrize("name", MODELS)
def test_nemo_computes_and_says_what_transformers_does(name, tmp_path):
    reference = save(tmp_path / "saved", name, shards="100KB" if name == "llama" else "5GB")
    facts = take_over(tmp_path / "saved", tmp_path / "base.nemo")
    assert facts["parameters"] == sum(parameter.numel() for parameter in reference.parameters())
    with toy.clean_megatron(), generator(tmp_path / "base.nemo") as loaded:
        ids = torch.randint(TOKENS, (2, 150), generator=torch.Generator().manual_seed(1))
        positions = torch.arange(150).expand_as(ids)
        with torch.no_grad():
            expected = reference(ids).logits
            logits = loaded.model.model(ids.cuda(), positions.cuda(), None).cpu()
        assert expected.std() > 0.5
        torch.testing.assert_close(logits, expected, atol=1e-4, rtol=1e-4)
        own = transformers.AutoTokenizer.from_pretrained(tmp_path / "saved")
        assert list(loaded.generate(PROMPTS, 12)) == [greedy(reference, own, prompt, 12) for prompt in PROMPTS]
        ours = loaded.model.tokenizer
        assert (ours.bos_id, ours.eos_id, ours.vocab_size) == (1, 2, TOKENS)
        assert ours.additional_special_tokens == ["<|im_start|>", "<|im_end|>"]
        chat = [{"role": "user", "content": "what is 1 plus 2?"}]
        assert ours.apply_chat_template(chat) == own.apply_chat_template(chat)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_weights_keep_their_type_and_every_bit(tmp_path, dtype):
    model = save(tmp_path / "saved", "qwen2", dtype, vocab_size=TOKENS).state_dict()
    facts = take_over(tmp_path / "saved", tmp_path / "base.nemo", 64)
    assert (facts["vocabulary"], facts["tokens"]) == (384, TOKENS)
    with open_base(tmp_path / "base.nemo") as base:
        assert base.config.make_vocab_size_divisible_by > 384 - TOKENS
        gate, up = (model[f"model.layers.1.mlp.{name}_proj.weight"] for name in ("gate", "up"))
        assert torch.equal(base.weight("mlp.linear_fc1", 1), torch.cat([gate, up]))
        q, k, v = (model[f"model.layers.2.self_attn.{name}_proj.weight"] for name in "qkv")
        grouped = [rows for g in range(2) for rows in (q[24 * g :][:24], k[8 * g :][:8], v[8 * g :][:8])]
        assert torch.equal(base.weight("self_attention.linear_qkv", 2), torch.cat(grouped))


def test_a_gpt2_that_was_saved_without_its_last_layer_is_the_same_model(tmp_path):
    model = save(tmp_path / "saved", "gpt2")
    take_over(tmp_path / "saved", tmp_path / "whole.nemo")
    tensors = {name.removeprefix("transformer."): tensor for name, tensor in model.state_dict().items()}
    del tensors["lm_head.weight"]
    tensors["h.0.attn.bias"] = torch.ones(1, 1, 256, 256).tril()  # the mask, which versions of old saved too
    save_file(tensors, tmp_path / "saved" / "model.safetensors", {"format": "pt"})
    take_over(tmp_path / "saved", tmp_path / "inner.nemo")
    assert (tmp_path / "inner.nemo").read_bytes() == (tmp_path / "whole.nemo").read_bytes()


def test_the_same_folder_becomes_the_same_file_once(tmp_path, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    save(tmp_path / "saved", "llama")
    path = base_of(Model(tmp_path / "saved"))
    take_over(tmp_path / "saved", tmp_path / "base.nemo")
    assert path.read_bytes() == (tmp_path / "base.nemo").read_bytes()
    os.utime(path, (1, 1))
    assert base_of(Model(tmp_path / "saved")) == path and path.stat().st_mtime == 1
    weights = tmp_path / "saved" / "model.safetensors"
    content = weights.read_bytes()
    weights.write_bytes(content[:-2] + b"\0\0")  # another model of the same names and sizes
    assert base_of(Model(tmp_path / "saved")) != path
    with tarfile.open(path) as tar:
        assert sorted(name[33:] for name in tar.getnames() if "tokenizer" in name) == [
            "tokenizer.json", "tokenizer_config.json",
        ]  # fmt: skip


def test_two_tensor_ranks_compute_the_same(tmp_path):
    reference = save(tmp_path / "saved", "qwen2", vocab_size=TOKENS)
    take_over(tmp_path / "saved", tmp_path / "base.nemo")
    ids = torch.randint(TOKENS, (2, 40), generator=torch.Generator().manual_seed(1))
    torch.save(ids, tmp_path / "ids.pt")
    forked.ranks(2, _logits, tmp_path)
    parts = [torch.load(tmp_path / f"{rank}.pt") for rank in range(2)]
    with torch.no_grad():
        expected = reference(ids).logits
    torch.testing.assert_close(torch.cat(parts, -1)[..., :TOKENS], expected, atol=1e-4, rtol=1e-4)


def _logits(folder):
    from nemo.collections.nlp.models.language_modeling.megatron_gpt_model import MegatronGPTModel
    from omegaconf import open_dict

    from nemo_tiedlora import platform

    path = str(folder / "base.nemo")
    with platform.host():
        config = MegatronGPTModel.restore_from(path, return_config=True)
        with open_dict(config):
            config.tensor_model_parallel_size = 2
        trainer = toy.trainer(config)
        model = MegatronGPTModel.restore_from(path, override_config_path=config, trainer=trainer)
        ids = torch.load(folder / "ids.pt").cuda()
        with torch.no_grad():
            logits = model.model.eval()(ids, torch.arange(ids.shape[1]).expand_as(ids).cuda(), None)
        torch.save(logits.cpu(), folder / f"{os.environ['RANK']}.pt")


def test_a_folder_is_trained_on_chat_rows_and_then_says_text(tmp_path):
    reference = save(tmp_path / "saved", "llama 3")
    chat = [
        [{"role": "user", "content": f"what is {a} plus 2?"}, {"role": "assistant", "content": str(a + 2)}]
        for a in range(8)
    ]
    (tmp_path / "rows.jsonl").write_text("".join(json.dumps({"messages": row}) + "\n" for row in chat))
    environment = {"XDG_CACHE_HOME": str(tmp_path / "cache")}
    data = [f"model.data.{split}_ds.file_names=[rows.jsonl]" for split in ("train", "validation")]
    code, said, problems = forked.script(
        "-m", "nemo_tiedlora", "finetune", "model.restore_from_path=saved", "model.peft.peft_scheme=tied_lora",
        "exp_manager.exp_dir=runs", "trainer.max_steps=2", "model.data.chat=true", *data,
        cwd=tmp_path, environment=environment,
    )  # fmt: skip
    assert code == 0, problems
    assert "<|im_start|>assistant\n«0" not in said and "«2<|im_end|>" in said.replace("\n", "")
    assert "huggingface/tokenizers" not in problems
    adapter = next((tmp_path / "runs").rglob("*.nemo"))
    for base, extra in (("saved", []), ("saved", ["--adapter", adapter])):
        code, said, problems = forked.script(
            "-m", "nemo_tiedlora", "generate", "--base", base, "--tokens", 8, "--json", *extra, PROMPTS[0],
            cwd=tmp_path, environment=environment,
        )  # fmt: skip
        assert code == 0, problems
        if not extra:
            own = transformers.AutoTokenizer.from_pretrained(tmp_path / "saved")
            assert json.loads(said)["completion"] == greedy(reference, own, PROMPTS[0], 8)
