"""Adapters as ``gguf-lora``: llama.cpp says on the model's GGUF file what PEFT says on the model; see ``test_vllm``."""

import json
import os
import subprocess
from pathlib import Path

import pytest
import torch
import toy
import transformers
from huggingface import gguf_files, random_adapters, saved_models, twins
from peft import PeftModel

from nemo_tiedlora.huggingface.taken_over import take_over

PYTHON = os.environ.get("SERVING_PYTHON")
pytestmark = [
    pytest.mark.thorough,
    pytest.mark.skipif(not PYTHON, reason="llama.cpp has an environment of its own: make test-serving"),
]
IDS, TOKENS = [5, 6, 7, 8, 9, 100, 50], 16
ADAPTERS = {
    "TL6": ("tied_lora", {"target_modules": ["all"], "alpha": 8.0}),
    "ShareLoRA": ("share_lora", {"groups": "odd_even", "target_modules": ["attention_qkv", "mlp_fc1"]}),
    "CondLoRA": ("cond_lora", {"target_modules": ["attention_q", "attention_v"]}),
}


@torch.no_grad()
@pytest.mark.parametrize("name", ["llama", "qwen2"])  # whose queries and keys have another order of rows there, and not
def test_llama_cpp_says_what_peft_says(name, tmp_path):
    saved, base = tmp_path / "saved", tmp_path / "base.nemo"
    model = saved_models.save(saved, name, hidden_size=128, num_attention_heads=4)
    tokenizer = transformers.AutoTokenizer.from_pretrained(saved)
    gguf_files.write(tmp_path / "model.gguf", model, tokenizer)
    take_over(saved, base)
    expected, files = [said(model, tokenizer)], [None]
    for adapter, (scheme, settings) in ADAPTERS.items():
        random_adapters.adapter_for(base, tmp_path / adapter, scheme, deviation=0.15, **settings)
        twins.exported(tmp_path / adapter, base, "gguf-lora", tmp_path / f"{adapter}.gguf")
        twins.exported(tmp_path / adapter, base, "peft-lora", tmp_path / f"{adapter}-peft")
        adapted = PeftModel.from_pretrained(twins.transformers_model(saved), tmp_path / f"{adapter}-peft").eval()
        expected.append(said(adapted, tokenizer))
        files.append(str(tmp_path / f"{adapter}.gguf"))
    assert len(set(expected)) == len(expected)
    (tmp_path / "requests.json").write_text(json.dumps({"adapters": files, "ids": IDS, "tokens": TOKENS}))
    command = [PYTHON, Path(__file__).parent / "llama_cpp.py", tmp_path / "model.gguf", tmp_path / "requests.json"]
    done = subprocess.run(command, capture_output=True, text=True, env=toy.FRESH, timeout=600)
    assert done.returncode == 0, done.stderr[-3000:]
    assert json.loads(done.stdout.splitlines()[-1]) == expected


def said(model, tokenizer):
    """Greedy text that does not end: llama.cpp leaves the end out of what it chooses from."""
    ids = list(IDS)
    for _ in range(TOKENS):
        scores = model(torch.tensor([ids])).logits[0, -1]
        scores[tokenizer.eos_token_id] = -torch.inf
        ids.append(int(scores.argmax()))
    return tokenizer.decode(ids[len(IDS) :], skip_special_tokens=True)
