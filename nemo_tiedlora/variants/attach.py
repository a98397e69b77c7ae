"""Adapters on a plain ``torch.nn`` model, without NeMo or Megatron."""

from collections.abc import Sequence

import torch
from torch import nn
from torch.nn import functional as F

from nemo_tiedlora.errors import UsageError, closest
from nemo_tiedlora.ops import apply
from nemo_tiedlora.variants.bank import Bank
from nemo_tiedlora.variants.base import Factors, FrozenWeight, Site, merged
from nemo_tiedlora.variants.config import VariantConfig
from nemo_tiedlora.variants.registry import build


class AdaptedLinear(nn.Module):
    """A frozen ``torch.nn.Linear`` plus its layer's factors."""

    def __init__(self, base: nn.Linear, bank: Bank, site: Site, dropout: float):
        super().__init__()
        self.base = base.requires_grad_(False)
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


def attach(model: nn.Module, config: VariantConfig, targets: Sequence[str]) -> Bank:
    """Adapt every ``nn.Linear`` of ``model`` whose last name is in ``targets``, in place; freeze everything else.

    Args:
        model: any module. The n-th linear of one name is taken as layer n; tensors are tied within one name.
        config: a variant's config, e.g. ``TiedConfig(rank=8)``; its ``target_modules`` are ignored.
        targets: last parts of module names, e.g. ``["q_proj", "v_proj"]``.

    Returns:
        The bank of the adapter's tensors; ``bank.named_tensors()`` lists them.

    Raises:
        UsageError: a target that no linear has, or a rank that does not fit.
    """
    found: dict[str, list[str]] = {}
    for name, module in model.named_modules():
        if isinstance(module, nn.Linear):
            found.setdefault(name.rpartition(".")[2], []).append(name)
    for target in targets:
        if target not in found:
            raise UsageError("targets", target, f"no linear layer has this name; {closest(target, found)}")
    model.requires_grad_(False)
    bank = Bank(build(config, max(len(found[target]) for target in targets)), checksums=config.checksums)
    adapted: dict[str, tuple[nn.Linear, Site]] = {}
    for target in targets:
        for layer, name in enumerate(found[target]):
            if layer in config.adapted_layers(len(found[target])):
                base = model.get_submodule(name)
                adapted[name] = base, Site(target, layer, base.in_features, base.out_features)
    bank.variant.start([site for _, site in adapted.values()])
    for name, (base, site) in adapted.items():
        _replace(model, name, AdaptedLinear(base, bank, site, config.dropout))
    return bank


@torch.no_grad()
def merge(model: nn.Module) -> nn.Module:
    """Write what every layer and its adapter do together into the frozen weight, and take the adapters off."""
    adapted = {name: module for name, module in model.named_modules() if isinstance(module, AdaptedLinear)}
    for module in adapted.values():  # all before the first is taken off: shared tensors live on one of them
        module.base.weight.copy_(merged(module.base.weight, module.factors()))
    for name, module in adapted.items():
        _replace(model, name, module.base)
    return model


def _replace(model: nn.Module, name: str, module: nn.Module) -> None:
    parent, _, child = name.rpartition(".")
    setattr(model.get_submodule(parent), child, module)
