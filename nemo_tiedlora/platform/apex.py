"""What stands in for Apex: the same names, with torch's own arithmetic behind them."""

from __future__ import annotations

from functools import partial, wraps
from types import SimpleNamespace

import torch
from torch.optim.adam import adam

from nemo_tiedlora.platform.patch import Restore, missing, patch

no_apex = missing("apex")


class FusedAdam(torch.optim.Optimizer):
    """`apex.optimizers.FusedAdam` on torch's Adam arithmetic: AdamW, unless `adam_w_mode` is off.

    The state is laid out as in Apex: moments per parameter, one step count per group. Checkpoints of NeMo and
    megatron-core rely on it (torch's own step count, a scalar per parameter, is something they cannot shard).
    """

    def __init__(
        self,
        params,
        lr=1e-3,
        bias_correction=True,
        betas=(0.9, 0.999),
        eps=1e-8,
        adam_w_mode=True,
        weight_decay=0.0,
        amsgrad=False,
        set_grad_none=True,
        capturable=False,
        master_weights=False,
    ):
        if amsgrad or master_weights or not bias_correction:
            raise ValueError("fused_adam without Apex: amsgrad, master_weights and bias_correction=False are not there")
        super().__init__(params, dict(lr=lr, betas=betas, eps=eps, weight_decay=weight_decay))
        self.adam_w_mode = adam_w_mode

    @torch.no_grad()
    def step(self, closure=None):
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        for group in self.param_groups:
            group["step"] = group.get("step", 0) + 1
            parameters = [parameter for parameter in group["params"] if parameter.grad is not None]
            for parameter in parameters:
                if not self.state[parameter]:
                    self.state[parameter].update(
                        exp_avg=torch.zeros_like(parameter), exp_avg_sq=torch.zeros_like(parameter)
                    )
            states = [self.state[parameter] for parameter in parameters]
            adam(
                parameters,
                [parameter.grad for parameter in parameters],
                [state["exp_avg"] for state in states],
                [state["exp_avg_sq"] for state in states],
                [],
                # The function counts each of these up by one.
                [torch.tensor(group["step"] - 1.0) for _ in parameters],
                decoupled_weight_decay=self.adam_w_mode,
                amsgrad=False,
                beta1=group["betas"][0],
                beta2=group["betas"][1],
                lr=group["lr"],
                weight_decay=group["weight_decay"],
                eps=group["eps"],
                maximize=False,
            )
        return loss


class MixedFusedLayerNorm(torch.nn.LayerNorm):
    """`apex.normalization.MixedFusedLayerNorm` on torch's layer norm."""

    def __init__(self, normalized_shape, eps=1e-5, elementwise_affine=True, **fused_only):
        super().__init__(normalized_shape, eps, elementwise_affine)


def multi_tensor_applier(operation, overflow, tensor_lists, *args):
    """`apex.multi_tensor_apply.multi_tensor_applier`: there to chunk tensors for one kernel launch, here a call."""
    return operation(overflow, tensor_lists, *args)


def multi_tensor_l2norm(overflow, tensor_lists, per_tensor):
    """`amp_C.multi_tensor_l2norm`: the norm over all tensors of one list, and on request each tensor's own."""
    norms = torch.stack(torch._foreach_norm(tensor_lists[0]))
    return torch.linalg.vector_norm(norms), norms if per_tensor else None


def cast_if_autocast_enabled(*tensors):
    """`apex._autocast_utils._cast_if_autocast_enabled`."""
    device = tensors[0].device.type
    if not torch.is_autocast_enabled(device):
        return tensors
    return tuple(tensor.to(torch.get_autocast_dtype(device)) for tensor in tensors)


@patch(needed=no_apex)
def apex_guards(restore: Restore) -> None:
    """NeMo refuses its strategy, model builder and O2 optimizer without Apex; megatron-core has what they use."""
    from megatron.core.tensor_parallel.layers import set_defaults_if_not_set_tensor_model_parallel_attributes
    from nemo.collections.nlp.modules.common.megatron import build_model
    from nemo.collections.nlp.parts import nlp_overrides
    from nemo.core.optim import optimizer_with_main_params
    from nemo.core.optim.mcore_optim import McoreDistributedOptimizer

    restore.set(nlp_overrides, "HAVE_APEX", True)
    restore.set(nlp_overrides, "McoreDistributedOptimizer", McoreDistributedOptimizer)
    # Only asked for with isinstance; no optimizer can be one without Apex.
    restore.set(nlp_overrides, "MegatronDistributedFusedAdam", type("MegatronDistributedFusedAdam", (), {}))
    restore.set(
        build_model,
        "set_defaults_if_not_set_tensor_model_parallel_attributes",
        set_defaults_if_not_set_tensor_model_parallel_attributes,
    )
    restore.set(optimizer_with_main_params, "HAVE_APEX", True)


@patch(needed=no_apex)
def apex_parameter_groups(restore: Restore) -> None:
    """Without adapters NeMo sorts parameters into weight-decay groups with an Apex function and Apex's norm classes.

    The norms in use without Apex are torch's; like Apex's, they are not decayed.
    """
    from nemo.collections.nlp.modules.common.megatron import utils

    restore.set(utils, "listify_model", lambda model: model if isinstance(model, list) else [model])
    restore.set(utils, "FusedLayerNorm", torch.nn.LayerNorm)
    restore.set(utils, "FastLayerNorm", torch.nn.LayerNorm)
    restore.set(utils, "MixedFusedRMSNorm", torch.nn.RMSNorm)


@patch(needed=no_apex)
def apex_autocast(restore: Restore) -> None:
    """The prompt encoder of `ptuning` casts the input of its fused GELU with an Apex function."""
    from nemo.collections.nlp.modules.common.megatron import fused_bias_gelu

    restore.set(fused_bias_gelu, "_cast_if_autocast_enabled", cast_if_autocast_enabled)


@patch(needed=no_apex)
def apex_gradient_clipping(restore: Restore) -> None:
    """NeMo's gradient clipping takes the norm of one rank's gradients with an Apex kernel.

    Only that kernel is replaced: which gradients count and how ranks add up stays NeMo's.
    """
    from nemo.collections.nlp.modules.common.megatron import clip_grads

    restore.set(clip_grads, "multi_tensor_applier", multi_tensor_applier)
    restore.set(clip_grads, "amp_C", SimpleNamespace(multi_tensor_l2norm=multi_tensor_l2norm))


@patch(needed=no_apex)
def apex_fused_adam(restore: Restore) -> None:
    """`optim.name=fused_adam`, the value in NeMo's fine-tuning configuration, is Apex's FusedAdam and wants CUDA."""
    from nemo.core import optim
    from nemo.core.optim import optimizers

    get_optimizer = optimizers.get_optimizer

    @wraps(get_optimizer)
    def get(name, **kwargs):
        return partial(FusedAdam, **kwargs) if name == "fused_adam" else get_optimizer(name, **kwargs)

    restore.set_item(optimizers.AVAILABLE_OPTIMIZERS, "fused_adam", FusedAdam)
    # With Apex there, NeMo counts FusedAdam among the optimizers whose state it prepares for a checkpoint to be loaded.
    restore.set(optimizers, "HAVE_APEX", True)
    restore.set(optimizers, "FusedAdam", FusedAdam)
    restore.set(optimizers, "get_optimizer", get)
    restore.set(optim, "get_optimizer", get)


@patch(needed=no_apex)
def apex_adapter_norm(restore: Restore) -> None:
    """The `adapter` scheme normalises with Apex's MixedFusedLayerNorm unless told otherwise."""
    from nemo.collections.nlp.modules.common.megatron.adapters import parallel_adapters

    restore.set(parallel_adapters, "HAVE_APEX", True)
    restore.set(parallel_adapters, "MixedFusedLayerNorm", MixedFusedLayerNorm)


@patch(needed=lambda: no_apex() and missing("transformer_engine")())
def apex_distributed_adam(restore: Restore) -> None:
    """`optim.name=mcore_distributed_optim` falls back to torch's AdamW, whose state it cannot load again."""
    from megatron.core import optimizer
    from megatron.core.optimizer import distrib_optimizer

    restore.set(optimizer, "Adam", FusedAdam)
    restore.set(distrib_optimizer, "Adam", FusedAdam)
    restore.set(distrib_optimizer, "HAVE_APEX_OR_TE", True)
