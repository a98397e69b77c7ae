"""What stands in for a CUDA device: the CPU, for code that says "cuda" without asking."""

from __future__ import annotations

from functools import wraps

import torch
from torch.overrides import TorchFunctionMode

from nemo_tiedlora.platform.patch import Restore, patch

CPU = torch.device("cpu")


def no_cuda() -> bool:
    return not torch.cuda.is_available()


def _is_cuda(device) -> bool:
    return isinstance(device, (str, torch.device)) and str(device).startswith("cuda")


class CudaOnCpu(TorchFunctionMode):
    """Sends every CUDA device handed to a torch function to the CPU."""

    def __torch_function__(self, func, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        if "device" in kwargs and _is_cuda(kwargs["device"]):
            kwargs = kwargs | {"device": CPU}
        if func is torch.Tensor.to and len(args) > 1 and _is_cuda(args[1]):
            args = (args[0], CPU, *args[2:])
        return func(*args, **kwargs)


class NullStream:
    """A CUDA stream with nothing in it: on a CPU every operation has finished when its call returns."""

    def __init__(self, *args, **kwargs):
        pass

    def synchronize(self):
        pass

    wait_stream = wait_event = record_event = lambda self, *args: None


@patch(needed=no_cuda)
def cuda_devices(restore: Restore) -> None:
    """megatron-core and NeMo pass device="cuda" to torch functions in dozens of places."""
    restore.enter_context(CudaOnCpu())


@patch(needed=no_cuda)
def cuda_calls(restore: Restore) -> None:
    """They call `.cuda()` on tensors and modules and drive the device through torch.cuda, both of which raise."""
    from lightning.fabric.utilities.device_dtype_mixin import _DeviceDtypeModuleMixin

    restore.set(torch.Tensor, "cuda", lambda self, *args, **kwargs: self)
    restore.set(torch.nn.Module, "cuda", lambda self, *args, **kwargs: self)
    restore.set(_DeviceDtypeModuleMixin, "cuda", lambda self, *args, **kwargs: self)
    restore.set(torch.cuda, "Stream", NullStream)
    # A function of its own for each name: torch.compile refuses one function object known under two torch.cuda names.
    restore.set(torch.cuda, "current_device", lambda: CPU)
    restore.set(torch.cuda, "set_device", lambda device: None)
    restore.set(torch.cuda, "synchronize", lambda device=None: None)
    restore.set(torch.cuda, "current_stream", lambda device=None: NullStream())


@patch(needed=no_cuda)
def cuda_tensor_types(restore: Restore) -> None:
    """Generation builds `torch.cuda.LongTensor(...)`; gradient clipping insists on `torch.cuda.FloatTensor`."""
    for name in ("Byte", "Int", "Long", "Half", "BFloat16", "Float", "Double"):
        restore.set(torch.cuda, f"{name}Tensor", getattr(torch, f"{name}Tensor"))


@patch(needed=no_cuda)
def cuda_autocast(restore: Restore) -> None:
    """Mixed precision is `torch.autocast("cuda")`, which without a device does nothing but warn.

    Backward passes ask whether it was on in the forward pass, and for which type.
    """
    autocast, is_enabled, dtype_of = torch.autocast.__init__, torch.is_autocast_enabled, torch.get_autocast_dtype

    def on_cpu(device_type):
        return "cpu" if device_type == "cuda" else device_type

    @wraps(autocast)
    def init(self, device_type, *args, **kwargs):
        autocast(self, on_cpu(device_type), *args, **kwargs)

    restore.set(torch.autocast, "__init__", init)
    restore.set(torch, "is_autocast_enabled", lambda device_type="cuda": is_enabled(on_cpu(device_type)))
    restore.set(torch, "get_autocast_dtype", lambda device_type: dtype_of(on_cpu(device_type)))
    restore.set(torch, "get_autocast_gpu_dtype", lambda: dtype_of("cpu"))


@patch(needed=no_cuda)
def cuda_random_state(restore: Restore) -> None:
    """megatron-core draws dropout and initial weights from CUDA generators: here from the CPU's one."""
    from megatron.core.tensor_parallel import random

    def get(device="cuda", clone=False, graph_safe=False):
        return torch.get_rng_state()

    def set(new_state, device=-1, graph_safe=False):
        torch.set_rng_state(new_state)

    restore.set(random, "_get_cuda_rng_state", get)
    restore.set(random, "_set_cuda_rng_state", set)
    restore.set(torch.cuda, "get_rng_state", lambda device="cuda": torch.get_rng_state())
    restore.set(torch.cuda, "set_rng_state", lambda new_state, device="cuda": torch.set_rng_state(new_state))
    restore.set(torch.cuda, "manual_seed", lambda seed: torch.manual_seed(seed) and None)


@patch(needed=no_cuda)
def cuda_seed(restore: Restore) -> None:
    """NeMo seeds megatron-core's generators only where it counts a CUDA device; dropout then asks for one in vain."""
    from megatron.core import tensor_parallel
    from nemo.collections.nlp.modules.common.megatron import megatron_init

    set_random_seed = megatron_init._set_random_seed

    @wraps(set_random_seed)
    def seed(seed_):
        set_random_seed(seed_)
        stage = megatron_init.get_pipeline_model_parallel_rank()
        tensor_parallel.model_parallel_cuda_manual_seed(seed_ + 100 * stage)

    restore.set(megatron_init, "_set_random_seed", seed)


@patch(needed=no_cuda)
def cuda_accelerator(restore: Restore) -> None:
    """`trainer.accelerator=gpu`, the value in every NeMo configuration, is refused by Lightning.

    It becomes `cpu`, with `devices` processes. The process group needs no help: Lightning takes gloo for CPU devices.
    """
    from lightning.pytorch.trainer.connectors.accelerator_connector import _AcceleratorConnector

    restore.set(_AcceleratorConnector, "_choose_gpu_accelerator_backend", staticmethod(lambda: "cpu"))


class _CudaTypeNames(TorchFunctionMode):
    """Gives CPU tensors the type names of CUDA tensors."""

    def __torch_function__(self, func, types, args=(), kwargs=None):
        result = func(*args, **(kwargs or {}))
        if func is torch.Tensor.type and isinstance(result, str):
            return result.replace("torch.", "torch.cuda.")
        return result


def _with_cuda_type_names(stock):
    @wraps(stock)
    def call(*args, **kwargs):
        with _CudaTypeNames():
            return stock(*args, **kwargs)

    return call


@patch(needed=no_cuda)
def cuda_main_params(restore: Restore) -> None:
    """`megatron_amp_O2` keeps float32 main weights only for parameters whose type is called torch.cuda.*.

    Its gradient reduction also divides inside NCCL, which gloo has no word for.
    """
    from nemo.core.optim.optimizer_with_main_params import MainParamsOptimizerWrapper

    stock = _with_cuda_type_names(MainParamsOptimizerWrapper.__init__)

    @wraps(stock)
    def init(self, *args, **kwargs):
        stock(self, *args, **kwargs)
        self._grad_div_ar_fusion = False

    restore.set(MainParamsOptimizerWrapper, "__init__", init)


@patch(needed=no_cuda)
def cuda_distributed_optimizer(restore: Restore) -> None:
    """`optim.name=mcore_distributed_optim` sorts and clips parameters by the same type names."""
    from megatron.core.optimizer import optimizer
    from megatron.core.optimizer.distrib_optimizer import DistributedOptimizer

    build = vars(DistributedOptimizer)["_build_model_and_main_param_groups"].__func__
    clip = optimizer.clip_grad_by_total_norm_fp32
    restore.set(DistributedOptimizer, "_build_model_and_main_param_groups", classmethod(_with_cuda_type_names(build)))
    restore.set(optimizer, "clip_grad_by_total_norm_fp32", _with_cuda_type_names(clip))
