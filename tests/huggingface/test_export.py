"""Adapters of every method as plain LoRA: PEFT on the model that transformers saved computes what NeMo does."""

import pytest
import random_adapters
import torch
import twins
from peft import PeftModel
from safetensors.torch import load_file

from nemo_tiedlora.checkpoint import legacy
from nemo_tiedlora.errors import UsageError

#: Name → the model, the scheme and its settings: each method, each target and each special case once.
CASES = {
    "TL6": ("llama", "tied_lora", {"target_modules": ["all"], "alpha": 10.0}),
    "TL4": ("qwen2", "tied_lora", {"preset": "TL4", "target_modules": ["attention_qkv"], "layer_selection": [1, 3]}),
    "LoRA": ("mistral", "tied_lora", {"preset": "LoRA", "target_modules": ["attention_q", "attention_v", "mlp_up"]}),
    "VeRA": ("llama 3", "vera", {"target_modules": ["attention_v"], "alpha": 3.0}),
    "ShareLoRA": ("qwen3", "share_lora", {"groups": [[0, 1]], "target_modules": ["attention", "mlp_gate"]}),
    "CondLoRA": ("llama", "cond_lora", {"target_modules": ["all"], "deviation": 0.1}),
    "DynaLoRA": ("qwen2", "dyna_lora", {"inner": "cond_lora", "target_modules": ["attention_qkv", "mlp_fc2"]}),
    "LoRA-XS": ("llama", "lora_xs", {"target_modules": ["mlp"], "rank": 3}),
    "Uni-LoRA": ("llama", "uni_lora", {"target_modules": ["attention_qkv"], "dimension": 300}),
    "Gemma": ("gemma", "tied_lora", {"preset": "TL2", "target_modules": ["attention", "mlp_up"]}),
    "GPT-2": ("gpt2", "cond_lora", {"target_modules": ["attention_q", "attention_v", "mlp"], "deviation": 0.1}),
    "GPT-2 with DoRA": ("gpt2", "tied_lora", {"target_modules": ["attention_qkv", "mlp_fc2"], "dora": True}),
    "DoRA": ("qwen3", "tied_lora", {"target_modules": ["all"], "dora": True, "alpha": 7.0}),
}  # fmt: skip


@torch.no_grad()
@pytest.mark.parametrize("name", CASES)
def test_peft_computes_what_nemo_does(name, bases, tmp_path):
    model, scheme, settings = CASES[name]
    saved, base = bases(model)
    random_adapters.adapter_for(base, tmp_path / "adapter", scheme, **settings)
    facts = twins.exported(tmp_path / "adapter", base, "peft-lora", tmp_path / "peft")
    plain = twins.logits(saved)
    expected = twins.nemo_logits(base, tmp_path / "adapter")
    assert (expected - plain).abs().max() > 0.5
    adapted = PeftModel.from_pretrained(twins.transformers_model(saved), tmp_path / "peft").eval()
    torch.testing.assert_close(adapted(twins.IDS).logits, expected, atol=1e-4, rtol=1e-4)
    torch.testing.assert_close(adapted.merge_and_unload()(twins.IDS).logits, expected, atol=1e-4, rtol=1e-4)
    tensors = load_file(tmp_path / "peft" / "adapter_model.safetensors")
    assert facts["parameters"] == sum(tensor.numel() for tensor in tensors.values())
    assert facts["bytes"] == sum(file.stat().st_size for file in (tmp_path / "peft").iterdir())
    assert facts["base_checksum"] == "matches"


@torch.no_grad()
@pytest.mark.parametrize("target", ["attention_v", "mlp_fc2"])
def test_vera_stays_vera_where_peft_has_words_for_it(target, bases, tmp_path):
    saved, base = bases("llama")
    random_adapters.adapter_for(base, tmp_path / "adapter", "vera", target_modules=[target], alpha=3.0)
    facts = twins.exported(tmp_path / "adapter", base, "peft-vera", tmp_path / "peft")
    adapted = PeftModel.from_pretrained(twins.transformers_model(saved), tmp_path / "peft").eval()
    expected = twins.nemo_logits(base, tmp_path / "adapter")
    assert (expected - twins.logits(saved)).abs().max() > 0.5
    torch.testing.assert_close(adapted(twins.IDS).logits, expected, atol=1e-4, rtol=1e-4)
    rows, columns = {"attention_v": (16, 48), "mlp_fc2": (48, 80)}[target]
    assert facts["parameters"] == 4 * (rows + columns) + 3 * (4 + rows)


@pytest.mark.parametrize(
    ("scheme", "settings", "said"),
    [
        ("vera", {"target_modules": ["attention_qkv"]}, "attention_q, attention_k, attention_v"),
        ("vera", {"target_modules": ["attention_q", "attention_v"]}, "a pair for attention_q, attention_v"),
        ("tied_lora", {"target_modules": ["attention_q"]}, "is not VeRA"),
        ("vera", {"target_modules": ["attention_q"], "dora": True}, "is not VeRA"),
    ],
)
def test_what_is_no_vera_of_peft_is_refused(scheme, settings, said, bases, tmp_path):
    _, base = bases("llama")
    random_adapters.adapter_for(base, tmp_path / "adapter", scheme, **settings)
    with pytest.raises(UsageError, match=said):
        twins.exported(tmp_path / "adapter", base, "peft-vera", tmp_path / "peft")
    assert [path.name for path in tmp_path.iterdir()] == ["adapter"]


@pytest.mark.parametrize(
    ("scheme", "settings"),
    [
        ("share_lora", {"groups": [[0, 1]], "target_modules": ["all"], "alpha": 6.0}),
        ("cond_lora", {"target_modules": ["attention_q", "attention_v", "mlp_fc2"], "layer_selection": [2, 3]}),
    ],
)
def test_stock_nemo_computes_the_same_with_its_own_lora(scheme, settings, bases, tmp_path):
    _, base = bases("qwen2")
    random_adapters.adapter_for(base, tmp_path / "adapter", scheme, deviation=0.1, **settings)
    facts = twins.exported(tmp_path / "adapter", base, "nemo-lora", tmp_path / "lora.nemo")
    stock = twins.nemo_logits(base, tmp_path / "lora.nemo")
    torch.testing.assert_close(stock, twins.nemo_logits(base, tmp_path / "adapter"), atol=1e-4, rtol=1e-4)
    back = legacy.convert(tmp_path / "lora.nemo")
    assert back.settings["rank"] == facts["rank"] == (8 if scheme == "cond_lora" else 4)
    assert sum(tensor.numel() for tensor in back.tensors.values()) == facts["parameters"]


def test_llama_cpp_gets_its_own_names_and_order_of_rows(bases, tmp_path):
    gguf = pytest.importorskip("gguf")
    saved, base = bases("llama")
    random_adapters.adapter_for(base, tmp_path / "adapter", "tied_lora", target_modules=["all"], alpha=8.0)
    twins.exported(tmp_path / "adapter", base, "gguf-lora", tmp_path / "lora.gguf")
    twins.exported(tmp_path / "adapter", base, "peft-lora", tmp_path / "peft")
    read = gguf.GGUFReader(tmp_path / "lora.gguf")
    said = {"general.type": "adapter", "general.architecture": "llama", "adapter.type": "lora"}
    assert {name: read.get_field(name).contents() for name in said} == said
    assert read.get_field("adapter.lora.alpha").contents() == 8.0
    found = {tensor.name: torch.tensor(tensor.data) for tensor in read.tensors}
    tensors = load_file(tmp_path / "peft" / "adapter_model.safetensors")
    assert len(found) == len(tensors) == 3 * 7 * 2
    from transformers.modeling_gguf_pytorch_utils import LlamaTensorProcessor

    back = LlamaTensorProcessor({"num_attention_heads": 6, "num_key_value_heads": 2})._reverse_permute_weights
    place = "base_model.model.model.layers.1"
    for name, theirs, heads in [("attn_q", "self_attn.q_proj", 6), ("attn_k", "self_attn.k_proj", 2)]:
        B = back(found[f"blk.1.{name}.weight.lora_b"], heads, heads)
        assert torch.equal(B, tensors[f"{place}.{theirs}.lora_B.weight"])
    same = {"attn_v": "self_attn.v_proj", "attn_output": "self_attn.o_proj"}
    same |= {f"ffn_{name}": f"mlp.{name}_proj" for name in ("gate", "up", "down")}
    for name, theirs in same.items():
        for part in "ab":
            expected = tensors[f"{place}.{theirs}.lora_{part.upper()}.weight"]
            assert torch.equal(found[f"blk.1.{name}.weight.lora_{part}"], expected)


def test_smaller_types_and_what_does_not_fit_them(bases, tmp_path):
    _, base = bases("llama")
    random_adapters.adapter_for(base, tmp_path / "adapter", "tied_lora", target_modules=["all"])
    whole = twins.exported(tmp_path / "adapter", base, "peft-lora", tmp_path / "whole")
    half = twins.exported(tmp_path / "adapter", base, "peft-lora", tmp_path / "half", "bfloat16")
    assert half["bytes"] < 0.6 * whole["bytes"] and whole["bytes"] > whole["adapter_bytes"]
    tensors = [load_file(tmp_path / name / "adapter_model.safetensors") for name in ("whole", "half")]
    for name, tensor in tensors[0].items():
        assert torch.equal(tensors[1][name], tensor.bfloat16())
    random_adapters.adapter_for(base, tmp_path / "large", "tied_lora", deviation=1e4)
    for form, path in (("peft-lora", "new"), ("nemo-lora", "new.nemo"), ("gguf-lora", "new.gguf")):
        with pytest.raises(UsageError, match="too large for it"):
            twins.exported(tmp_path / "large", base, form, tmp_path / path, "float16")
        assert not list(tmp_path.glob("*new*"))


def test_another_base_needs_force_and_nothing_is_replaced(bases, tmp_path):
    _, base = bases("llama")
    random_adapters.adapter_for(base, tmp_path / "adapter", "cond_lora")
    random_adapters.adapter_for(bases("qwen2")[1], tmp_path / "foreign", "cond_lora")
    random_adapters.adapter_for(base, tmp_path / "dora", "tied_lora", dora=True)
    for adapter, against, form, path, said in [
        ("adapter", bases("mistral")[1], "peft-lora", "new", "made for another base: kv_channels"),
        ("foreign", base, "peft-lora", "new", "not the base this adapter was trained on"),
        ("adapter", base, "peft-lora", "dora", "new or empty"),
        ("adapter", base, "peft-lora", "adapter", "would replace what it is made from"),
        ("adapter", base, "nemo-lora", "new", r"must end in \.nemo"),
        ("dora", base, "nemo-lora", "new.nemo", "merge the adapter"),
    ]:
        with pytest.raises(UsageError, match=said):
            twins.exported(tmp_path / adapter, against, form, tmp_path / path)
        assert not list(tmp_path.glob("*new*"))
    facts = twins.exported(tmp_path / "foreign", base, "peft-lora", tmp_path / "new", force=True)
    assert facts["base_checksum"] == "differs"
