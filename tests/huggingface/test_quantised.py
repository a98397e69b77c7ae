"""Adapters on frozen weights of 4 and 8 bits compute and learn what they do on the same weights unquantised."""

import pytest
import torch
import twins
from by_hand import contents

from nemo_tiedlora import huggingface
from nemo_tiedlora.errors import UsageError

METHODS = {
    "TL6": ("tied_lora", {"preset": "TL6"}),
    "VeRA": ("vera", {}),
    "CondLoRA": ("cond_lora", {}),
    "DoRA": ("tied_lora", {"preset": "LoRA", "dora": True}),
}
SUFFIXES = ("q_proj", "k_proj", "v_proj", "down_proj")


def pair(folder, bits):
    """A model with quantised layers, and one with the same weights that are not."""
    bnb = pytest.importorskip("bitsandbytes")
    one, two = (twins.transformers_model(folder) for _ in range(2))
    for name, linear in list(two.named_modules()):
        if not name.endswith(SUFFIXES):
            continue
        sizes = linear.in_features, linear.out_features, False
        if bits == 4:
            made = bnb.nn.Linear4bit(*sizes, compute_dtype=torch.float32, quant_type="nf4")
        else:
            made = bnb.nn.Linear8bitLt(*sizes, has_fp16_weights=False)
        made.load_state_dict(linear.state_dict())
        made = made.to("cpu")
        one.set_submodule(name, made)
        if bits == 4:
            linear.weight.data = bnb.functional.dequantize_4bit(made.weight.data, made.weight.quant_state)
        else:
            linear.weight.data = made.weight.CB.float() * (made.weight.SCB / 127)[:, None]
    return one, two


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("bits", [4, 8])
def test_an_adapter_computes_and_learns_what_it_does_on_the_same_weights(bits, method, bases, tmp_path):
    quantised, plain = pair(bases("llama")[0], bits)
    scheme, settings = METHODS[method]
    adapter = huggingface.attach(quantised, scheme, ["attention_qkv", "mlp_fc2"], rank=4, **settings)
    draw = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for tensor in adapter.parameters():
            tensor += 0.03 * torch.randn(tensor.shape, generator=draw)
    adapter.save(tmp_path / "adapter")
    with pytest.raises(UsageError, match="its weights, in float32 here, are not those that the adapter was trained on"):
        huggingface.load(twins.transformers_model(bases("llama")[0]), tmp_path / "adapter")
    same = huggingface.load(plain, tmp_path / "adapter")
    outputs, gradients = [], []
    for one in (adapter, same):
        logits = one.model(twins.IDS).logits
        logits.square().mean().backward()
        outputs.append(logits.detach())
        gradients.append({key: tensor.grad for key, tensor in one.named_tensors().items() if tensor.requires_grad})
    assert (outputs[0] - outputs[1]).norm() < 1e-4 * outputs[1].norm()
    for key, gradient in gradients[1].items():
        assert (gradients[0][key] - gradient).norm() < 1e-4 * gradient.norm(), key
    again = huggingface.load(adapter.detach(), tmp_path / "adapter")
    again.save(tmp_path / "again")
    assert contents(tmp_path / "again") == contents(tmp_path / "adapter")
    with pytest.raises(UsageError, match="its weight is quantised, and would lose what is merged"):
        again.merge()
    with torch.no_grad():
        torch.testing.assert_close(again.model(twins.IDS).logits, outputs[0])
