"""PEFT's own adapters as ours: NeMo computes with them what PEFT does, and back again they are the same bits."""

import json

import peft
import pytest
import random_adapters
import torch
import twins
from safetensors.torch import load_file, save_file

from nemo_tiedlora.checkpoint import read
from nemo_tiedlora.errors import UsageError
from nemo_tiedlora.huggingface.peft_import import import_peft

ALL = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]
CASES = {
    "LoRA": ("qwen2", peft.LoraConfig(r=4, lora_alpha=6, target_modules=ALL, use_rslora=True)),
    "some layers": ("llama", peft.LoraConfig(r=3, target_modules=["q_proj", "v_proj"], layers_to_transform=[0, 2])),
    "DoRA": ("qwen3", peft.LoraConfig(r=4, target_modules=["k_proj", "gate_proj", "down_proj"], use_dora=True)),
    "VeRA": ("llama", peft.VeraConfig(r=4, target_modules=["q_proj", "v_proj", "down_proj"])),
}


@pytest.fixture
def trained(bases, tmp_path):
    """``trained(name)`` → a PEFT adapter with random values, its folder, and the base."""

    def make(name):
        model, config = CASES[name]
        saved, base = bases(model)
        adapted = peft.get_peft_model(twins.transformers_model(saved), config)
        torch.manual_seed(3)
        with torch.no_grad():
            for parameter in adapted.parameters():
                if parameter.requires_grad:
                    parameter.add_(0.15 * torch.randn_like(parameter))
        adapted.save_pretrained(tmp_path / "peft")
        return adapted.eval(), tmp_path / "peft", base

    return make


@torch.no_grad()
@pytest.mark.parametrize("name", CASES)
def test_nemo_computes_what_peft_does(name, trained, tmp_path):
    adapted, folder, base = trained(name)
    facts = import_peft(folder, base, tmp_path / "adapter")
    expected = adapted(twins.IDS).logits
    with adapted.disable_adapter():
        assert (expected - adapted(twins.IDS).logits).abs().max() > 0.5
    torch.testing.assert_close(twins.nemo_logits(base, tmp_path / "adapter"), expected, atol=1e-4, rtol=1e-4)
    count = sum(p.numel() for p in adapted.parameters() if p.requires_grad)
    assert facts["trainable"] == count
    if name == "VeRA":
        return
    twins.exported(tmp_path / "adapter", base, "peft-lora", tmp_path / "back")
    before, after = (load_file(path / "adapter_model.safetensors") for path in (folder, tmp_path / "back"))
    assert set(before) == set(after)
    exact = not CASES[name][1].use_dora  # its lengths are gains times norms there
    for key, tensor in before.items():
        torch.testing.assert_close(after[key], tensor, rtol=0 if exact else 1e-5, atol=0 if exact else 1e-6)


def test_what_was_fused_is_fused_again(bases, tmp_path):
    _, base = bases("llama")
    random_adapters.adapter_for(base, tmp_path / "adapter", "share_lora", target_modules=["all"], groups=[[0, 1]])
    twins.exported(tmp_path / "adapter", base, "peft-lora", tmp_path / "peft")
    import_peft(tmp_path / "peft", base, tmp_path / "back.nemo")
    back = read(tmp_path / "back.nemo")
    assert sorted(back.settings["target_modules"]) == ["attention_dense", "attention_qkv", "mlp_fc1", "mlp_fc2"]
    torch.testing.assert_close(
        twins.nemo_logits(base, tmp_path / "back.nemo"), twins.nemo_logits(base, tmp_path / "adapter")
    )


def changed(folder, config=None, tensors=None):
    """Change the files of a PEFT adapter."""
    if config:
        path = folder / "adapter_config.json"
        path.write_text(json.dumps(json.loads(path.read_text()) | config))
    if tensors:
        path = folder / "adapter_model.safetensors"
        found = load_file(path)
        tensors(found)
        save_file(found, path)


A = "base_model.model.model.layers.0.self_attn.q_proj.lora_A.weight"


@pytest.mark.parametrize(
    ("config", "tensors", "said"),
    [
        ({"peft_type": "IA3"}, None, "peft_type='IA3'.*LORA, VERA"),
        ({"bias": "all"}, None, "bias='all'"),
        ({"modules_to_save": ["lm_head"]}, None, "modules_to_save"),
        ({"rank_pattern": {"q_proj": 8}}, None, "rank_pattern"),
        ({"init_lora_weights": "pissa_niter_4"}, None, "changes the base"),
        ({"something_new": 3}, None, "something_new=3"),
        ({"r": 5}, None, r"q_proj.lora_A.weight has shape \(3, 48\); the base and r=5 say \(5, 48\)"),
        ({"use_dora": True}, None, "it must have lora_A.weight, lora_B.weight, lora_magnitude_vector"),
        (None, lambda found: found.pop(A), "q_proj has lora_B.weight; it must have"),
        (None, lambda found: found.update({"lm_head.lora_A.weight": torch.ones(2, 2)}), "no place.*lm_head"),
        (None, lambda found: found.update({A.replace(".0.", ".7."): torch.ones(3, 48)}), "no place.*layers.7"),
        (None, lambda found: found[A].fill_(torch.nan), "finite numbers"),
        (None, lambda found: [found.pop(name) for name in list(found) if ".2.self_attn.v" in name], "has no adapter"),
    ],
)
def test_what_cannot_be_ours_is_refused_in_one_line(config, tensors, said, trained, tmp_path):
    _, folder, base = trained("some layers")
    changed(folder, config, tensors)
    with pytest.raises(UsageError, match=said) as refused:
        import_peft(folder, base, tmp_path / "adapter")
    assert "\n" not in str(refused.value) and not (tmp_path / "adapter").exists()


def test_damaged_and_missing_files_are_named(trained, tmp_path):
    _, folder, base = trained("some layers")
    weights = folder / "adapter_model.safetensors"
    content = weights.read_bytes()
    for cut in (0, 7, 100, len(content) - 1):
        weights.write_bytes(content[:cut])
        with pytest.raises(UsageError, match="damaged or cut off"):
            import_peft(folder, base, tmp_path / "adapter")
    weights.rename(folder / "adapter_model.bin")
    with pytest.raises(UsageError, match="could run code"):
        import_peft(folder, base, tmp_path / "adapter")
    with pytest.raises(UsageError, match=r"adapter=.*there is no adapter_config\.json"):
        import_peft(tmp_path, base, tmp_path / "adapter")


def test_the_adapter_that_is_read_is_not_replaced(trained):
    _, folder, base = trained("some layers")
    before = [path.read_bytes() for path in sorted(folder.iterdir())]
    with pytest.raises(UsageError, match="would replace what it is made from"):
        import_peft(folder, base, folder)
    assert [path.read_bytes() for path in sorted(folder.iterdir())] == before


def test_vera_that_would_be_drawn_again_is_refused(trained, tmp_path):
    _, folder, base = trained("VeRA")
    changed(folder, None, lambda found: found.pop("base_model.vera_A"))
    with pytest.raises(UsageError, match="save_projection=True"):
        import_peft(folder, base, tmp_path / "adapter")
