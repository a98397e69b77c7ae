"""The folder of an adapter can be pushed to the Hub: its page has its numbers, and nobody's own page is lost."""

import re

import huggingface_hub
import pytest
import torch
import twins
from by_hand import encoder
from safetensors.torch import load_file

from nemo_tiedlora import huggingface


def card(folder):
    found = huggingface_hub.ModelCard.load(folder / "README.md")
    cells = re.findall(r"^\| (.*) \| (.*) \|$", found.text, re.MULTILINE)
    (code,) = re.findall(r"```python\n(.*?)```", found.text, re.DOTALL)
    return found.data.to_dict(), dict(cells), code


def test_the_page_of_an_adapter_has_its_numbers_and_its_lines_load_it(bases, tmp_path, monkeypatch):
    saved, _ = bases("llama")
    model = twins.transformers_model(saved)
    adapter = huggingface.attach(model, "tied_lora", ["attention_qkv"], rank=4, alpha=6.0, layer_selection=[1, 3])
    sha256 = adapter.save(tmp_path / "adapter")
    data, cells, _ = card(tmp_path / "adapter")
    assert data["library_name"] == "nemo_tiedlora" and "tied_lora" in data["tags"] and "base_model" not in data
    assert str(saved) not in (tmp_path / "adapter" / "README.md").read_text()  # a path is nobody's business
    adapter.save(tmp_path / "adapter", base_name="someone/small-llama")
    data, cells, code = card(tmp_path / "adapter")
    assert data["base_model"] == "someone/small-llama" and data["base_model_relation"] == "adapter"
    trained = 4 * 48 + 80 * 4 + 2 * (4 + 80)
    assert cells["Method"] == "tied_lora, preset TL6" and cells["Rank"] == "4; the change is multiplied by 1.5"
    assert cells["Targets"] == "`attention_qkv`" and cells["Layers"] == "2 of 3"
    assert cells["Trained parameters"] == cells["Numbers in the file"] == f"{trained:,}"
    size = (tmp_path / "adapter" / "adapter_model.safetensors").stat().st_size
    assert (
        cells["Bytes"] == f"{size:,} (`adapter_model.safetensors`)" and cells["SHA-256 of the adapter"] == f"`{sha256}`"
    )
    (checksum,) = adapter.adapter().base.checksums.values()
    assert cells["SHA-256 of the model's `self_attention.linear_qkv`"] == f"`{checksum}`"
    monkeypatch.chdir(tmp_path)
    scope = {}
    exec(code.replace("someone/small-llama", str(saved)).replace("this folder", "adapter"), scope)
    assert torch.equal(scope["model"](twins.IDS).logits, model(twins.IDS).logits)


def test_the_page_of_an_exported_adapter_has_its_numbers_and_its_lines_load_it(bases, tmp_path):
    saved, _ = bases("llama")
    model = twins.transformers_model(saved)
    adapter = huggingface.attach(model, "vera", ["q_proj"], rank=4)
    with torch.no_grad():
        adapter.named_tensors()["attention_q.1.v"].normal_()
    adapter.export_peft(tmp_path / "peft", base_name="someone/small-llama")
    data, cells, code = card(tmp_path / "peft")
    assert data["library_name"] == "peft" and data["base_model"] == "someone/small-llama"
    numbers = sum(tensor.numel() for tensor in load_file(tmp_path / "peft" / "adapter_model.safetensors").values())
    assert cells["Here, as plain LoRA"] == f"{numbers:,} numbers, rank 4, 3 modules"
    scope = {}
    exec(code.replace("someone/small-llama", str(saved)).replace("this folder", str(tmp_path / "peft")), scope)
    with torch.no_grad():
        torch.testing.assert_close(scope["model"].eval()(twins.IDS).logits, model(twins.IDS).logits)


@pytest.mark.parametrize("own", ["# mine\n", "---\nlicense: mit\n---\n"])
def test_a_page_of_ones_own_stays_and_ours_is_written_again(own, tmp_path):
    adapter = huggingface.attach(encoder("bert"), "tied_lora", ["query"], rank=2)
    adapter.model.config._name_or_path = "someone/bert"
    page = tmp_path / "README.md"
    adapter.save(tmp_path)
    data, cells, _ = card(tmp_path)
    assert data["base_model"] == "someone/bert" and cells["Trained whole"] == "classifier: 50 parameters"
    before = page.read_bytes()
    with torch.no_grad():
        adapter.parameters()[0].add_(1)
    adapter.save(tmp_path)
    assert page.read_bytes() != before
    page.write_text(own)
    adapter.save(tmp_path)
    assert page.read_text() == own
