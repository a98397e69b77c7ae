"""LoRA+: the parts of B learn faster, whatever the method and the schedule."""

import pytest
import torch
from stack import Layers

from nemo_tiedlora import attach, variants
from nemo_tiedlora.errors import UsageError
from nemo_tiedlora.variants import ConditionalConfig, DynamicConfig, SharedConfig, TiedConfig

CONFIGS = {
    "LoRA": TiedConfig(preset="LoRA", rank=2, lr_ratio=16),
    "TL6": TiedConfig(preset="TL6", rank=2, lr_ratio=16),
    "ShareLoRA": SharedConfig(groups=[[0, 1]], train=["A", "B", "u", "v"], rank=2, lr_ratio=16),
    "CondLoRA": ConditionalConfig(rank=2, lr_ratio=16),
    "DynaLoRA": DynamicConfig(inner="lora", active=3, rank=2, lr_ratio=16),
    "DynaLoRA, set within": DynamicConfig(inner="lora", active=3, rank=2, settings={"lr_ratio": 16}),
    "DoRA": TiedConfig(preset="LoRA", rank=2, lr_ratio=16, dora=True),
}
OF_B = ("B", "v", "theta_B")


@pytest.mark.parametrize("method", CONFIGS)
def test_the_parts_of_b_move_that_many_times_as_far(method):
    """One step of sign descent moves each value by its learning rate."""
    torch.manual_seed(0)
    model = Layers()
    adapter = attach(model, CONFIGS[method], ["qkv"])
    with torch.no_grad():
        for tensor in adapter.named_tensors().values():
            tensor += 0.1 * torch.rand_like(tensor)  # so that no gradient is 0
    optimizer = torch.optim.Adam(adapter.parameter_groups(lr=1e-3), eps=1e-30)
    adapter.attach_to(optimizer)
    schedule = torch.optim.lr_scheduler.ExponentialLR(optimizer, 0.5)  # computes the next rate from the last one
    for expected in (1e-3, 5e-4):
        before = {key: tensor.detach().clone() for key, tensor in adapter.named_tensors().items()}
        optimizer.state.clear()  # a first step of Adam is a step of sign descent
        optimizer.zero_grad()
        model(torch.randn(64, 6, dtype=torch.float64)).square().sum().backward()
        optimizer.step()
        schedule.step()
        for key, tensor in adapter.named_tensors().items():
            ratio = 16 if key.rpartition(".")[2] in OF_B else 1
            moved = (tensor - before[key]).abs().max().item()
            assert moved == pytest.approx(expected * ratio, rel=1e-6), key


@pytest.mark.parametrize("preset", ["TL1", "TL3"])
def test_a_ratio_between_nothing_and_something_is_refused(preset):
    with pytest.raises(UsageError, match="lr_ratio=2.*only [AB] is trained"):
        variants.build(TiedConfig(preset=preset, lr_ratio=2), 3)
