"""A base as a folder of transformers: bit by bit the model it was made of, or one with the same logits."""

import json
import tarfile

import pytest
import torch
import toy
import transformers
from safetensors.torch import load_file
from saved_models import MODELS, TOKENS, save

from nemo_tiedlora.checkpoint.base import open_base
from nemo_tiedlora.cli import app
from nemo_tiedlora.embedded.base import base as built_in
from nemo_tiedlora.errors import UsageError
from nemo_tiedlora.huggingface.given_back import give_back, hf_config
from nemo_tiedlora.huggingface.taken_over import take_over
from nemo_tiedlora.job.generate import generator

CHAT = [{"role": "user", "content": "what is 1 plus 2?"}]


@pytest.mark.parametrize("name", MODELS)
def test_what_was_taken_over_comes_back_bit_by_bit(name, tmp_path):
    dtype = {"qwen2": torch.bfloat16, "gemma": torch.bfloat16, "gpt2": torch.float16}.get(name, torch.float32)
    save(tmp_path / "saved", name, dtype, shards="100KB" if name == "gpt2" else "5GB")
    before = {}
    for file in (tmp_path / "saved").glob("*.safetensors"):
        before |= load_file(file)
    take_over(tmp_path / "saved", tmp_path / "base.nemo", 64)
    facts = give_back(tmp_path / "base.nemo", tmp_path / "out")
    after = load_file(tmp_path / "out" / "model.safetensors")
    assert facts["parameters"] == sum(tensor.numel() for tensor in before.values())
    assert after.keys() == before.keys()
    for key, tensor in before.items():
        assert after[key].dtype == dtype and torch.equal(after[key], tensor), key
    for file in ("config.json", "generation_config.json"):
        assert json.loads((tmp_path / "out" / file).read_text()) == json.loads((tmp_path / "saved" / file).read_text())
    old, new = (transformers.AutoTokenizer.from_pretrained(tmp_path / folder) for folder in ("saved", "out"))
    text = "<s>what is 3 plus 4?</s> <|im_start|>x  y\n"
    assert new(text).input_ids == old(text).input_ids
    assert new.apply_chat_template(CHAT) == old.apply_chat_template(CHAT)
    assert new.special_tokens_map == old.special_tokens_map
