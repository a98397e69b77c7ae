"""What torch and safetensors are enough for. Run in an environment that has no more, in an empty folder."""

import json
from pathlib import Path

import torch
from torch import nn

import nemo_tiedlora
from nemo_tiedlora import checkpoint, variants
from nemo_tiedlora.checkpoint.adapter import Blueprint
from nemo_tiedlora.errors import UsageError
from nemo_tiedlora.model.data import ModelConfig
from nemo_tiedlora.model.sizes import sizes

SHAPE = {"num_layers": 3, "hidden_size": 16, "ffn_hidden_size": 32, "num_attention_heads": 4, "activation": "gelu"}
SETTINGS = {"share_lora": {"groups": "odd_even"}, "uni_lora": {"dimension": 64}}


class Layer(nn.Module):
    def __init__(self):
        super().__init__()
        self.q_proj, self.v_proj = nn.Linear(16, 16), nn.Linear(16, 16)

    def forward(self, x):
        return x + torch.tanh(self.q_proj(x)) + self.v_proj(x)


torch.manual_seed(0)
for scheme in variants.METHODS:
    model, x = nn.Sequential(*(Layer() for _ in range(3))), torch.randn(8, 16)
    adapter = nemo_tiedlora.attach(model, scheme, ["q_proj", "v_proj"], rank=2, **SETTINGS.get(scheme, {}))
    optimizer = torch.optim.AdamW(adapter.parameter_groups(lr=1e-2))
    adapter.attach_to(optimizer)
    before = model(x).pow(2).mean()
    for _ in range(4):
        optimizer.zero_grad()
        model(x).pow(2).mean().backward()
        optimizer.step()
    trained = model(x).detach()
    assert trained.pow(2).mean() < before, scheme
    adapter.merge()
    torch.testing.assert_close(model(x), trained, atol=1e-5, rtol=1e-5)

settings, base = {"rank": 2, "preset": "TL6"}, checkpoint.Base(SHAPE)
tensors = {key: torch.randn(shape) for key, shape in Blueprint("tied_lora", settings, base).shapes.items()}
written = checkpoint.Adapter("tied_lora", settings, base, tensors)
sha256 = checkpoint.write(written, "adapter")
read = checkpoint.read("adapter")
assert all(torch.equal(read.tensors[key], tensor) for key, tensor in tensors.items())
assert json.loads(Path("adapter/adapter_config.json").read_text())["sha256"] == sha256
# On QKV, 16 x 48: rank x (in + out) once, and rank and out per layer.
assert sizes(variants.config_for("tied_lora", settings), ModelConfig(SHAPE)).trainable == 2 * (16 + 48) + 3 * (2 + 48)
try:
    checkpoint.write(written, "adapter.nemo")
except UsageError as error:
    assert "pip install 'nemo_tiedlora[cli]'" in str(error)
else:
    raise AssertionError("a .nemo was written, which has YAML in it")
assert [path.name for path in Path().iterdir()] == ["adapter"]
