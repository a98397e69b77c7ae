"""Adapters on a plain ``torch.nn`` model, without NeMo or Megatron."""

from collections.abc import Sequence
from typing import Any

import torch
from torch import nn
from torch.nn import functional as F
from torch.optim import Optimizer

from nemo_tiedlora.attach.contract import Contract, error_without, parameter_groups
from nemo_tiedlora.errors import UsageError, closest
from nemo_tiedlora.ops import apply
from nemo_tiedlora.variants import Bank, Factors, FrozenWeight, Site, Variant, VariantConfig, build, config_for, merged
from nemo_tiedlora.variants.config import check_list


class AdaptedLinear(nn.Module):
    """A frozen ``torch.nn.Linear`` plus its layer's factors."""

    def __init__(self, base: nn.Linear, bank: Bank, site: Site, dropout: float):
        super().__init__()
        self.base = base
        self.bank, self.site, self.dropout = bank, site, dropout
        bank.adopt(self, site, FrozenWeight(base.weight))

    def factors(self) -> Factors:
        """This layer's A, B, scale and gain."""
        return self.bank.factors(self.site, FrozenWeight(self.base.weight))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """(samples, ..., in) → (samples, ..., out)."""
        output = apply(self.base(x), F.dropout(x, self.dropout, self.training), *self.factors(), self.base.bias)
        if self.training and self.bank.variant.observes:
            self.bank.variant.observe(self.site, output)
        return output


class Attached:
    """An adapter on a model: its tensors, how they are trained, and how they leave.

    Any optimizer over the trained tensors will do as it is, unless the method takes part in its steps (DynaLoRA chooses
    what trains, LoRA+ has two learning rates). Then make it of ``parameter_groups`` and call ``attach_to``; a backward
    pass without says so. ``attach_to`` is also what lets CondLoRA and DoRA form factors once per step instead of in
    every pass: fused optimizers write tensors unnoticed, so without it nothing formed in training is used twice.

    Attributes:
        model: the adapted model.
        bank: the adapter's tensors, each once, and every layer's factors.
    """

    def __init__(self, model: nn.Module, bank: Bank):
        self.model, self.bank = model, bank
        self._contract: Contract | None = None
        self._guards = [
            tensor.register_post_accumulate_grad_hook(self._check_contract)
            for _, tensor in bank.trained().values()
            if error_without(bank.variant)
        ]

    @property
    def variant(self) -> Variant:
        """The source of factors."""
        return self.bank.variant

    def named_tensors(self) -> dict[str, torch.Tensor]:
        """Every tensor of the adapter by its key, e.g. ``q_proj.A``, each once; the trained ones are parameters."""
        return self.bank.named_tensors()

    def parameter_groups(self, lr: float | None = None) -> list[dict[str, Any]]:
        """The trained tensors as an optimizer's parameter groups.

        Args:
            lr: of what A_l is made of; with ``lr_ratio``, B_l's is that many times it. None: the optimizer's default.
        """
        return parameter_groups(self.bank, lr=lr)

    def attach_to(self, optimizer: Optimizer) -> Contract:
        """Make every step of ``optimizer`` the method's.

        Args:
            optimizer: over ``parameter_groups(lr)``, which may be among others.

        Returns:
            The contract: it has a state for checkpoints, and can be detached.

        Raises:
            UsageError: the optimizer lacks groups that the method needs, is a wrapper that does not tell of its steps,
                or is a second one.
        """
        if self._contract and self._contract.in_force:
            raise UsageError("optimizer", type(optimizer).__name__, "attached to one already; detach() that first")
        self._contract = Contract(optimizer, self.bank)
        return self._contract

    def merge(self) -> nn.Module:
        """Write what every layer and its adapter do together into the frozen weight, and take the adapter off.

        Returns:
            The model, as it was before ``attach`` but for its weights (and with all of them frozen).
        """
        if self._contract:
            self._contract.detach()
        for guard in self._guards:
            guard.remove()
        adapted = {
            name: module
            for name, module in self.model.named_modules()
            if isinstance(module, AdaptedLinear) and module.bank is self.bank
        }
        with torch.no_grad():
            for module in adapted.values():  # all before the first is taken off: shared tensors live on one of them
                module.base.weight.copy_(merged(module.base.weight, module.factors()))
        for name, module in adapted.items():
            _replace(self.model, name, module.base)
        return self.model

    def _check_contract(self, tensor: torch.Tensor) -> None:
        if self._contract and self._contract.in_force:
            return
        if error := error_without(self.variant):
            raise error


def attach(model: nn.Module, method: str | VariantConfig, targets: Sequence[str], **settings: Any) -> Attached:
    """Adapt every ``nn.Linear`` of ``model`` whose last name is in ``targets``, in place; freeze everything else.

    Args:
        model: any module. The n-th linear of one name is taken as layer n; tensors are tied within one name.
        method: a scheme's name, e.g. ``"tied_lora"``, or a method's config, e.g. ``TiedConfig(rank=8)``. Its
            ``target_modules`` are ignored.
        targets: last parts of module names, e.g. ``["q_proj", "v_proj"]``.
        settings: those of a method given by name, e.g. ``preset="TL6", rank=8``.

    Returns:
        The adapter on the model: its tensors, its parameter groups, and what goes with the optimizer.

    Raises:
        UsageError: an unknown method or setting, a target that no linear has, a rank that does not fit, or a model that
            has an adapter already. Then the model is as it was.
    """
    if isinstance(method, str):
        method = config_for(method, settings)
    elif settings:
        raise UsageError("settings", settings, f"write them into the {type(method).__name__}")
    check_list("targets", targets, str)
    found: dict[str, dict[str, nn.Linear]] = {}
    for name, module in model.named_modules():
        if isinstance(module, AdaptedLinear):
            raise UsageError("model", type(model).__name__, f"{name} has an adapter already; merge() it first")
        if isinstance(module, nn.Linear):
            found.setdefault(name.rpartition(".")[2], {})[name] = module
    for target in targets:
        if target not in found:
            raise UsageError("targets", target, f"no linear layer has this name; {closest(target, found)}")
    layers = max(len(found[target]) for target in targets)
    for layer in method.layer_selection or ():
        if not 1 <= layer <= layers:
            raise UsageError("layer_selection", layer, f"the model has layers 1 to {layers}")
    bank = Bank(build(method, layers), checksums=method.checksums)
    placed: dict[str, tuple[nn.Linear, Site]] = {}
    for target in targets:
        for layer, (name, base) in enumerate(found[target].items()):
            if layer in method.adapted_layers(len(found[target])):
                placed[name] = base, Site(target, layer, base.in_features, base.out_features)
    bank.variant.start([site for _, site in placed.values()])
    adapted = {name: AdaptedLinear(base, bank, site, method.dropout) for name, (base, site) in placed.items()}
    model.requires_grad_(False)
    for name, module in adapted.items():
        _replace(model, name, module)
    return Attached(model, bank)


def _replace(model: nn.Module, name: str, module: nn.Module) -> None:
    parent, _, child = name.rpartition(".")
    setattr(model.get_submodule(parent), child, module)
