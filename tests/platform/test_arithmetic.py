"""The stand-ins compute what the real things compute."""

import pytest
import torch

from nemo_tiedlora.platform.apex import FusedAdam, MixedFusedLayerNorm
from nemo_tiedlora.platform.norm import ZeroCenteredLayerNorm, ZeroCenteredRMSNorm


def parameters_with_gradients(scale, seed=0):
    generator = torch.Generator().manual_seed(seed)
    parameters = [torch.nn.Parameter(torch.zeros(shape)) for shape in ((3, 5), (7,), (2, 2, 2))]
    for parameter in parameters:
        parameter.grad = scale * torch.randn(parameter.shape, generator=generator)
    return parameters


@pytest.mark.parametrize("scale", [0.01, 1.0, 100.0])
def test_clipping_is_torchs(world, scale):
    from nemo.collections.nlp.modules.common.megatron.clip_grads import clip_grad_norm_fp32

    ours, theirs = parameters_with_gradients(scale), parameters_with_gradients(scale)
    exact = torch.cat([parameter.grad.double().flatten() for parameter in ours]).norm()
    norm = clip_grad_norm_fp32(ours, 1.0)
    assert torch.nn.utils.clip_grad_norm_(theirs, 1.0).item() == pytest.approx(norm.item(), rel=1e-6)
    assert norm.item() == pytest.approx(exact.item(), rel=1e-6)
    for mine, other in zip(ours, theirs, strict=True):
        torch.testing.assert_close(mine.grad, other.grad)


def test_clipping_counts_shared_parameters_once_and_clips_all(world):
    from nemo.collections.nlp.modules.common.megatron.clip_grads import clip_grad_norm_fp32

    parameters = parameters_with_gradients(10.0)
    parameters[0].shared = True
    before = parameters[0].grad.clone()
    expected = torch.cat([parameter.grad.flatten() for parameter in parameters[1:]]).norm()
    norm = clip_grad_norm_fp32(parameters, 1.0)
    torch.testing.assert_close(norm, expected)
    torch.testing.assert_close(parameters[0].grad, before / expected)


def test_clipping_without_gradients(world):
    from nemo.collections.nlp.modules.common.megatron.clip_grads import clip_grad_norm_fp32

    assert clip_grad_norm_fp32([torch.nn.Parameter(torch.zeros(2))], 1.0).item() == 0


@pytest.mark.parametrize("adam_w_mode", [True, False])
def test_fused_adam_is_torchs(adam_w_mode):
    hyper = dict(lr=1e-2, betas=(0.9, 0.98), eps=1e-6, weight_decay=0.1)
    ours, theirs = parameters_with_gradients(1.0), parameters_with_gradients(1.0)
    reference = (torch.optim.AdamW if adam_w_mode else torch.optim.Adam)(theirs, **hyper)
    fused = FusedAdam(ours, adam_w_mode=adam_w_mode, **hyper)
    for step in range(5):
        for mine, other in zip(ours, theirs, strict=True):
            mine.grad = other.grad = torch.randn(mine.shape, generator=torch.Generator().manual_seed(step))
        fused.step()
        reference.step()
        if step == 2:
            # A checkpoint in between changes nothing.
            resumed = FusedAdam(ours, adam_w_mode=adam_w_mode, **hyper)
            resumed.load_state_dict(fused.state_dict())
            fused = resumed
    for mine, other in zip(ours, theirs, strict=True):
        torch.testing.assert_close(mine, other)


def test_fused_adam_refuses_what_it_cannot_do():
    with pytest.raises(ValueError, match="without Apex"):
        FusedAdam([torch.nn.Parameter(torch.zeros(1))], bias_correction=False)


@pytest.mark.parametrize(
    "zero_centered, plain",
    [(ZeroCenteredLayerNorm, torch.nn.LayerNorm), (ZeroCenteredRMSNorm, torch.nn.RMSNorm)],
)
def test_zero_centered_norms_store_the_weight_minus_one(zero_centered, plain):
    ours, reference, x = zero_centered(8, eps=1e-5), plain(8, eps=1e-5), torch.randn(3, 8)
    torch.testing.assert_close(ours(x), reference(x))
    with torch.no_grad():
        reference.weight.uniform_(0.5, 1.5)
        ours.weight.copy_(reference.weight - 1)
    torch.testing.assert_close(ours(x), reference(x))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_zero_centered_rms_norm_is_gemmas(dtype):
    from transformers.models.gemma.modeling_gemma import GemmaRMSNorm

    ours, reference = ZeroCenteredRMSNorm(64, eps=1e-6).to(dtype), GemmaRMSNorm(64).to(dtype)
    with torch.no_grad():
        for norm in (ours, reference):
            norm.weight.copy_(0.01 * torch.randn(64, generator=torch.Generator().manual_seed(0)))
    x = torch.randn(8, 64, generator=torch.Generator().manual_seed(1)).to(dtype)
    torch.testing.assert_close(ours(x), reference(x), rtol=1e-6 if dtype is torch.float32 else 1e-3, atol=1e-6)


def test_mixed_fused_layer_norm_takes_apexs_arguments():
    norm = MixedFusedLayerNorm(8, 1e-5, sequence_parallel_enbaled=False)
    x = torch.randn(3, 8)
    torch.testing.assert_close(norm(x), torch.nn.functional.layer_norm(x, (8,)))
