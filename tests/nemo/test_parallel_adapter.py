"""The parallel adapter baseline: where it sits, that it trains, and what it refuses."""

import pytest
import torch
import toy

from nemo_tiedlora.errors import UsageError

SETTINGS = {"adapter_tuning": toy.ADAPTER | {"norm_position": None}}


def test_the_bottleneck_is_beside_the_block(finetuning):
    model, _ = finetuning(peft_scheme="parallel_adapter", **SETTINGS)
    block = model.model.decoder.layers[1].mlp
    adapter = next(iter(block.adapter_layer.values()))
    hidden = torch.randn(5, 2, 32)
    model.eval()
    plain, _ = block(hidden)
    with torch.no_grad():
        adapter.linear_out.weight.normal_()
    down, up = adapter.linear_in.weight, adapter.linear_out.weight
    expected = plain + torch.nn.functional.silu(hidden @ down.T) @ up.T
    torch.testing.assert_close(block(hidden)[0], expected)
    block.set_enabled_adapters(enabled=False)
    torch.testing.assert_close(block(hidden)[0], plain)


def test_it_trains_nothing_else(finetuning):
    model, trainer = finetuning(peft_scheme="parallel_adapter", **SETTINGS, trainer={"max_steps": 12})
    before = {name: tensor.detach().clone() for name, tensor in model.named_parameters()}
    trainer.fit(model)
    moved = {name for name, tensor in model.named_parameters() if not torch.equal(tensor, before[name])}
    assert moved == {name for name in before if "adapter_layer" in name}
    assert len(moved) == 2 * 4  # two matrices in each of four layers


def test_tied_weights_are_refused(finetuning):
    tied = {"adapter_tuning": toy.ADAPTER | {"weight_tying": True}}
    with pytest.raises(UsageError, match="^adapter_tuning.weight_tying=True: not with parallel_adapter"):
        finetuning(peft_scheme="parallel_adapter", **tied)
