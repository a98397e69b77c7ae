"""Adapters on a plain ``torch.nn`` model, without NeMo or Megatron."""

from collections.abc import Collection, Iterable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import nn
from torch.optim import Optimizer

from nemo_tiedlora.attach.contract import Contract, error_without, parameter_groups
from nemo_tiedlora.attach.placed import NAME, Place, Placed, Span, is_spread, sizes
from nemo_tiedlora.attach.together import joined
from nemo_tiedlora.errors import UsageError, closest
from nemo_tiedlora.variants import Bank, Site, Variant, VariantConfig, build, config_for
from nemo_tiedlora.variants.base import Alone
from nemo_tiedlora.variants.config import check_list


class DataParallel(Alone):
    """All processes hold the whole model, and each sees other samples."""

    def across(self, scores: torch.Tensor) -> torch.Tensor:
        torch.distributed.all_reduce(scores)
        return scores


class Attached:
    """An adapter on a model: its tensors, how they are trained, and how they leave.

    Any optimizer over the trained tensors will do as it is, unless the method takes part in its steps (DynaLoRA chooses
    what trains, LoRA+ has two learning rates). Then make it of ``parameter_groups`` and call ``attach_to``; a backward
    pass without says so. ``attach_to`` is also what lets CondLoRA and DoRA form factors once per step instead of in
    every pass: fused optimizers write tensors unnoticed, so without it nothing formed in training is used twice.

    Args:
        model: everything in it is frozen.
        places: the adapted layers.
        layers: number of layers in the whole model.
        stored: keys of tensors that will be loaded, so that they need not be computed.
        name: which adapter of the model's it is.

    Attributes:
        model: the adapted model.
        adapters: all that are on the model, of which this becomes the only active one.
        bank: the adapter's tensors, each once, and every layer's factors.

    Raises:
        UsageError: what does not fit, or a model that has an adapter of this name already. Then the model is as it was.
    """

    def __init__(
        self,
        model: nn.Module,
        config: VariantConfig,
        places: Iterable[Place],
        layers: int,
        stored: Collection[str] = (),
        name: str = NAME,
    ):
        places = list(places)
        self.model, self.name = model, name
        self.adapters = joined(model, name)
        self.bank = Bank(build(config, layers), checksums=config.checksums, stored=stored)
        self.variant.start([place.site for place in places])
        self.placed = [Placed(place, self.bank, config.dropout, name) for place in places]
        self._contract: Contract | None = None
        self._guards: list[Any] = []
        #: What was trained when it was put on, and whether the model has been spread over processes since.
        self._tensors: list[nn.Parameter] = []
        self._sharded: bool | None = None
        self._prepare()
        self.adapters._join(self)

    def _prepare(self) -> None:
        """Make what else there is to it, before it goes on."""

    def _put(self) -> None:
        for placed in self.placed:
            placed.adapters = self.adapters
            placed.put()
        self._want(True)  # or there would be nothing to be told of
        self._tensors, self._sharded = self.parameters(), None
        self._guards = [tensor.register_post_accumulate_grad_hook(self._after_backward) for tensor in self._tensors]
        self._guards.append(self.model.register_forward_pre_hook(self._check_tensors))

    def _take_off(self) -> None:
        if self._contract:
            self._contract.detach()
        for guard in self._guards:
            guard.remove()
        for placed in self.placed:
            placed.take_off()

    def _switch(self, on: bool) -> None:
        """Change the model's outputs, or do not."""
        for placed in self.placed:
            placed.enabled = on

    def _want(self, on: bool) -> None:
        """Want gradients, and take part in the optimizer's steps, or do not."""
        for tensor in self.parameters():
            tensor.requires_grad_(on)
            if not on:
                tensor.grad = None  # any optimizer would take a step by what is left
        if self._contract:
            self._contract.paused = not on

    def whole_modules(self) -> list[str]:
        """Names of the modules that are trained whole."""
        return []

    def _keep_whole_modules(self) -> None:
        """They are the model's now."""

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
        return parameter_groups(self.bank, self.name, lr)

    def attach_to(self, optimizer: Optimizer) -> Contract:
        """Make every step of ``optimizer`` the method's; where torch.distributed runs, on all of its processes at once.

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
        several = torch.distributed.is_available() and torch.distributed.is_initialized()
        self._contract = Contract(optimizer, self.bank, self.name, DataParallel() if several else None)
        self._contract.paused = self.name not in self.adapters.active
        return self._contract

    @contextmanager
    def disabled(self) -> Iterator[None]:
        """The model as it was without this adapter, inside a ``with`` block."""
        with self.adapters.disabled(self):
            yield

    def merge(self) -> nn.Module:
        """Write what every layer and its adapter do together into the frozen weight, and take the adapter off, and all
        others; see ``Adapters.merge`` for mixes.

        Returns:
            The model, as it was before ``attach`` but for its weights and the modules that are trained whole.

        Raises:
            UsageError: a tensor of the adapter has NaN or infinity in it, it is off the model, or a weight of the model
                cannot take it.
        """
        self._check_on()
        return self.adapters.merge(self.name)

    def unmerge(self) -> nn.Module:
        """Take what was merged out of the weights again, to within rounding, and put all adapters back on the model.

        Raises:
            UsageError: it is not merged, or its change depends on the weights that it changed.
        """
        if not self._merged:
            raise UsageError("adapter", self.variant.config.scheme, "is not merged")
        return self.adapters.unmerge()

    def detach(self) -> nn.Module:
        """Take the adapter off. Others stay; without any, the model is as it was before, down to what wants gradients.

        Raises:
            UsageError: it is off already.
        """
        self._check_on()
        self.adapters._leave(self)
        return self.model

    @property
    def _merged(self) -> bool:
        return self.adapters.merged is not None and self.adapters.get(self.name) is self

    def _check_on(self) -> None:
        if self.adapters.merged is not None or self.adapters.get(self.name) is not self:
            raise UsageError("adapter", self.variant.config.scheme, "is off the model already")

    def parameters(self) -> list[nn.Parameter]:
        """All that is trained, each once."""
        return [tensor for _, tensor in self.bank.trained().values()]

    def ignored_params(self) -> set[nn.Parameter]:
        """What ``fully_shard`` needs in ``ignored_params``: the tensors of all adapters on the model, which every
        process has whole, as layers of several of its groups share them. Their gradients are averaged here."""
        return {parameter for adapter in self.adapters.values() for parameter in adapter.parameters()}

    def _in_place(self) -> bool:
        """Whether the model still has the very tensors that are trained."""
        try:
            return all(now is then for now, then in zip(self.parameters(), self._tensors, strict=True))
        except AttributeError:
            return False  # not even parameters, under FSDP's first version

    def _check_tensors(self, model: nn.Module, args: tuple) -> None:
        if not self._in_place():
            way_out = "other tensors have taken the place of the adapter's; leave them whole, as "
            way_out += "fully_shard(..., ignored_params=adapter.ignored_params()) does"
            raise UsageError("model", type(model).__name__, way_out)

    def _after_backward(self, tensor: torch.Tensor) -> None:
        if not (self._contract and self._contract.in_force) and (error := error_without(self.variant)):
            raise error
        if self._sharded is None:
            self._sharded = is_spread(self.model)
        if self._sharded:
            assert tensor.grad is not None  # it was just given one
            torch.distributed.all_reduce(tensor.grad)
            tensor.grad /= torch.distributed.get_world_size()


def attach(
    model: nn.Module, method: str | VariantConfig, targets: Sequence[str], name: str = NAME, **settings: Any
) -> Attached:
    """Adapt every linear layer of ``model`` whose last name is in ``targets``, in place; freeze everything else.

    Args:
        model: any module. The n-th linear of one name is taken as layer n; tensors are tied within one name.
        method: a scheme's name, e.g. ``"tied_lora"``, or a method's config, e.g. ``TiedConfig(rank=8)``. Its
            ``target_modules`` are ignored.
        targets: last parts of module names, e.g. ``["q_proj", "v_proj"]``.
        name: what to call it beside other adapters on the model.
        settings: those of a method given by name, e.g. ``preset="TL6", rank=8``.

    Returns:
        The adapter on the model: its tensors, its parameter groups, and what goes with the optimizer.

    Raises:
        UsageError: an unknown method or setting, a target that no linear has, a rank that does not fit, or a model that
            has an adapter of this name already. Then the model is as it was.
    """
    if isinstance(method, str):
        method = config_for(method, settings)
    elif settings:
        raise UsageError("settings", settings, f"write them into the {type(method).__name__}")
    check_list("targets", targets, str)
    found: dict[str, dict[str, nn.Module]] = {}
    for path, module in model.named_modules():
        if sizes(module):
            found.setdefault(path.rpartition(".")[2], {})[path] = module
    for target in targets:
        if target not in found:
            raise UsageError("targets", target, f"no linear layer has this name; {closest(target, found)}")
    layers = max(len(found[target]) for target in targets)
    for layer in method.layer_selection or ():
        if not 1 <= layer <= layers:
            raise UsageError("layer_selection", layer, f"the model has layers 1 to {layers}")
    places = [
        Place(Site(target, layer, *(sizes(base) or ())), (Span(path, base),))
        for target in targets
        for layer, (path, base) in enumerate(found[target].items())
        if layer in method.adapted_layers(len(found[target]))
    ]
    return Attached(model, method, places, layers, name=name)
