"""What an optimizer keeps of an adapter's tensors, by their keys: float32 copies, moments, settings of their groups.

NeMo has two kinds of optimizer here: those whose groups are ours (``attach.parameter_groups``), perhaps with a wrapper
that keeps float32 copies; and Megatron's distributed one, which makes groups of its own and gives each data-parallel
rank a share of every tensor.
"""

from collections.abc import Iterator
from typing import Any

import torch
from megatron.core import parallel_state
from torch import Tensor, nn

from nemo_tiedlora.parallel.cut import has_parts

State = dict[str, Any]


def inner(trainer) -> torch.optim.Optimizer:
    """The optimizer itself: NeMo wraps it to keep float32 copies."""
    optimizer = trainer.optimizers[0]
    return getattr(optimizer, "optimizer", optimizer)


def stepping(trainer) -> torch.optim.Optimizer:
    """The torch optimizer whose steps are the run's: itself, or the first inside Megatron's distributed one."""
    optimizer = inner(trainer)
    if not hasattr(optimizer, "mcore_optimizer"):
        return optimizer
    return next(one.optimizer for one in _chained(optimizer) if not one.is_stub_optimizer)


def _chained(optimizer: torch.optim.Optimizer) -> list:
    distributed = optimizer.mcore_optimizer
    return getattr(distributed, "chained_optimizers", [distributed])


def trained(optimizer: torch.optim.Optimizer, scheme: str) -> Iterator[tuple[str, dict[str, Any], Tensor]]:
    """(key, group, tensor) of every tensor that an optimizer with our groups trains for a scheme."""
    for group in optimizer.param_groups:
        if group.get("adapter") == scheme:
            for key, tensor in zip(group["keys"], group["params"], strict=True):
                yield key, group, tensor


def states(model, scheme: str) -> dict[str, State]:
    """By key: ``tensor`` as the optimizer has it, ``settings`` of its group, and its state, such as ``exp_avg``.

    Of this tensor and pipeline rank; data-parallel ranks must call it together.
    """
    if model.use_mcore_dist_optim:
        return _joined(model, dict(_shares(model, scheme)))
    optimizer = inner(model.trainer)
    return {
        key: {"tensor": tensor, "settings": settings_of(group), **optimizer.state.get(tensor, {})}
        for key, group, tensor in trained(optimizer, scheme)
    }


@torch.no_grad()
def restore(model, scheme: str, saved: dict[str, State]) -> None:
    """Take back what ``states`` gave, under a layout in which this rank holds tensors of these shapes."""
    if model.use_mcore_dist_optim:
        for key, share in _shares(model, scheme):
            mine = {name: _cut(value, share) for name, value in saved[key].items()}
            share.main.copy_(mine.pop("tensor"))
            share.group.update(mine.pop("settings"))
            share.optimizer.state[share.main] = {name: _like(share.main, value) for name, value in mine.items()}
        return
    optimizer = inner(model.trainer)
    for key, group, tensor in trained(optimizer, scheme):
        state = dict(saved[key])
        tensor.copy_(state.pop("tensor"))
        group.update(state.pop("settings"))
        if state:
            optimizer.state[tensor] = {name: _like(tensor, value) for name, value in state.items()}


class _Share:
    """This data-parallel rank's share of a tensor in Megatron's distributed optimizer: numbers that lie in a row."""

    def __init__(self, distributed, parameter: nn.Parameter):
        place, order = distributed.model_param_group_index_map[parameter]
        numbers = distributed._get_model_param_range_map(parameter)["param"]
        self.optimizer = distributed.optimizer
        self.group = self.optimizer.param_groups[place]
        self.main = self.group["params"][order]
        self.start, self.end, self.whole = numbers.start, numbers.end, parameter.shape


def _shares(model, scheme: str) -> Iterator[tuple[str, _Share]]:
    for distributed in _chained(inner(model.trainer)):
        for key, (_, parameter) in model.adaptations[scheme].bank.trained().items():
            if parameter in distributed.model_param_gbuf_map:
                yield key, _Share(distributed, parameter)


def _joined(model, shares: dict[str, _Share]) -> dict[str, State]:
    mine = {}
    for key, share in shares.items():
        state = {"tensor": share.main, **share.optimizer.state.get(share.main, {})}
        state = {name: value.cpu() if isinstance(value, Tensor) else value for name, value in state.items()}
        mine[key] = (share.start, share.end, share.whole, {**state, "settings": settings_of(share.group)})
    group = parallel_state.get_data_parallel_group(with_context_parallel=True)
    ranks = [mine] * torch.distributed.get_world_size(group)
    torch.distributed.all_gather_object(ranks, mine, group=group)
    joined: dict[str, State] = {}
    for rank in ranks:
        for key, (start, end, whole, state) in rank.items():
            known = joined.setdefault(key, {})
            for name, value in state.items():
                if has_parts(value):
                    known.setdefault(name, value.new_empty(whole)).view(-1)[start:end] = value.view(-1)
                else:
                    known[name] = value
    return joined


def _cut(value: Any, share: _Share) -> Any:
    return value.reshape(-1)[share.start : share.end].view_as(share.main) if has_parts(value) else value


def settings_of(group: dict[str, Any]) -> dict[str, Any]:
    """What an optimizer's group says beside its tensors."""
    return {name: value for name, value in group.items() if name not in ("params", "keys")}


def _like(tensor: Tensor, value: Any) -> Any:
    """A tensor's optimizer state as its optimizer would have it: counters of steps stay on the CPU."""
    if isinstance(value, Tensor):
        return value.clone().to(tensor.device) if value.dim() else value.clone()
    return value
