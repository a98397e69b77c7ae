"""Adapters of real NeMo models as canonical files: saved, loaded, merged, and NeMo's own converted."""

import tarfile

import pytest
import torch
from test_adapter import EVERY_MATRIX, logits

from nemo_tiedlora.checkpoint import read
from nemo_tiedlora.checkpoint.base import open_base
from nemo_tiedlora.checkpoint.merge import merge, unmerge
from nemo_tiedlora.errors import UsageError

CASES = {
    "lora": ("tied_lora", {"preset": "LoRA"}),
    "TL1": ("tied_lora", {"preset": "TL1"}),
    "TL6": ("tied_lora", {"preset": "TL6", "layer_selection": [2, 4], "alpha": 6}),
    "vera": ("vera", {}),
    "share": ("share_lora", {"groups": [[0, 1]], "train": ["A", "B", "u", "v"], "rank_expansion": 5}),
    "cond": ("cond_lora", {"groups": [[2, 3]]}),
    "dyna": ("dyna_lora", {"inner": "tied_lora", "settings": {"preset": "TL5"}}),
    "dora": ("tied_lora", {"preset": "TL6", "dora": True}),
    "dyna-cond-dora": ("dyna_lora", {"inner": "cond_lora", "dora": True}),
}


def adapted(finetuning, scheme, settings, base="llama"):
    """A model whose adapter is far from its start."""
    torch.manual_seed(0)
    model, _ = finetuning(base, peft_scheme=scheme, **{f"{scheme}_tuning": {"rank": 4} | settings})
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if name in model.adapter_keys:
                parameter.add_(0.2 * torch.randn_like(parameter))
    model.setup_complete = True  # from here on NeMo saves the adapter, not the model
    return model


@pytest.mark.parametrize("targets", [["all"], EVERY_MATRIX], ids=["fused", "single"])
@pytest.mark.parametrize("case", CASES)
def test_saved_loaded_and_merged_give_the_same_logits(finetuning, files, tmp_path, case, targets):
    scheme, settings = CASES[case]
    model = adapted(finetuning, scheme, settings | {"target_modules": targets})
    expected = logits(model)
    model.save_to(str(tmp_path / "adapter.nemo"))
    with tarfile.open(tmp_path / "adapter.nemo") as archive:
        assert archive.getnames() == ["model_config.yaml", "adapter_config.json", "adapter_model.safetensors"]
    saved = read(tmp_path / "adapter.nemo")
    trained = model.adaptations[scheme].bank.trained()
    assert set(saved.tensors) == set(trained)
    assert all(torch.equal(tensor, trained[key][1]) for key, tensor in saved.tensors.items())
    assert set(saved.base.checksums) == set(saved.paths)

    fresh, _ = finetuning(peft_scheme="none")
    fresh.load_adapters(str(tmp_path / "adapter.nemo"))
    assert torch.equal(logits(fresh), expected)

    facts = merge(files["llama"], tmp_path / "adapter.nemo", tmp_path / "merged.nemo")
    assert facts["base_checksum"] == "matches"
    files["merged"] = tmp_path / "merged.nemo"
    whole, _ = finetuning("merged", peft_scheme="none")
    torch.testing.assert_close(logits(whole), expected, rtol=1e-4, atol=1e-4)

    if scheme == "cond_lora" or settings.get("dora"):
        with pytest.raises(UsageError, match="cannot be taken out"):
            unmerge(tmp_path / "merged.nemo", tmp_path / "adapter.nemo", tmp_path / "back.nemo")
        return
    back = unmerge(tmp_path / "merged.nemo", tmp_path / "adapter.nemo", tmp_path / "back.nemo")
    with open_base(tmp_path / "back.nemo") as after, open_base(files["llama"]) as before:
        assert after.config == before.config
        largest = max(
            float((after.weight(path, layer) - before.weight(path, layer)).abs().max())
            for path in saved.paths
            for layer in range(4)
        )
    assert largest == facts["unmerge_max_difference"] <= 1e-6
    assert back["exact"] is (largest == 0)
