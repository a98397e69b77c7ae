"""The tensors of one adapter, each stored once, however many layers use it."""

from collections.abc import Callable, Collection

import torch
from torch import nn

from nemo_tiedlora.variants.base import Factors, Site, TensorSpec, Variant
from nemo_tiedlora.variants.frozen import check, record
from nemo_tiedlora.variants.init import COMPUTED
from nemo_tiedlora.variants.weight import FrozenWeight

#: Takes a whole tensor to the part that this process holds.
Cut = Callable[[torch.Tensor, TensorSpec, Site], torch.Tensor]


class Bank:
    """Creates a variant's tensors on the modules that adopt them, and hands each layer its factors.

    A shared tensor lives on the first module that asks for it; the bank remembers where. Trained tensors become
    parameters. Frozen ones become non-persistent buffers: no optimizer sees them, no checkpoint holds them, and they
    are the same in every process because they are drawn from the seed, or else are in every adapter file.

    Args:
        variant: the source of factors; it has been told of all layers (``start``).
        cut: takes a whole tensor to this process's part of it; by default all of it.
        checksums: what a saved adapter records of its frozen tensors, by key; compared as each is drawn.
        agreed: gives all processes that hold a layer the same bits of what each computed from its weight.
        stored: keys of tensors that will be loaded, so that they need not be computed.

    Attributes:
        checksums: what there is to record of each frozen tensor: its SHA-256 and its fingerprint.
    """

    def __init__(
        self,
        variant: Variant,
        cut: Cut | None = None,
        checksums: dict[str, str] | None = None,
        agreed: Callable[[torch.Tensor], torch.Tensor] | None = None,
        stored: Collection[str] = (),
    ):
        self.variant = variant
        self.cut, self.agreed, self.stored = cut, agreed, stored
        self.expected = checksums or {}
        self.checksums: dict[str, str] = {}
        self._homes: dict[str, tuple[nn.Module, str]] = {}
        self._specs: dict[str, TensorSpec] = {}
        self._parts: dict[Site, dict[str, tuple[nn.Module, str]]] = {}

    def adopt(self, module: nn.Module, site: Site, weight: FrozenWeight) -> None:
        """Give ``site`` its tensors, of the weight's device and dtype.

        Those that no other module holds yet are created on ``module``.

        Raises:
            UsageError: the rank does not fit the layer, or a frozen tensor is not the one that was trained against.
        """
        self.variant.check(site)
        parts, specs = {}, self.variant.tensors(site)
        computed = self._computed(site, specs, weight)
        for name, spec in specs.items():
            if spec.key not in self._homes:
                tensor = self._create(spec, site, weight, computed.get(name))
                if spec.trained:
                    module.register_parameter(name, nn.Parameter(tensor))
                else:
                    module.register_buffer(name, tensor, persistent=False)
                self._homes[spec.key] = (module, name)
                self._specs[spec.key] = spec
            parts[name] = self._homes[spec.key]
        self._parts[site] = parts

    @torch.no_grad()
    def _computed(self, site: Site, specs: dict[str, TensorSpec], weight: FrozenWeight) -> dict[str, torch.Tensor]:
        """What the variant computes from the layer's weight, of the tensors that are still to be made."""
        wanted = [
            spec.key
            for spec in specs.values()
            if spec.init.kind == COMPUTED and spec.key not in self._homes and spec.key not in self.stored
        ]
        if not wanted or weight.tensor.device.type == "meta":
            return {}
        found = self.variant.computed(site, weight)
        return {name: self.agreed(tensor) for name, tensor in found.items()} if self.agreed else found

    def _create(
        self, spec: TensorSpec, site: Site, weight: FrozenWeight, computed: torch.Tensor | None
    ) -> torch.Tensor:
        device, dtype = weight.tensor.device, weight.tensor.dtype
        shape = spec.shape(site, self.variant.rank)
        if device.type == "meta":
            return torch.empty(shape, device="meta", dtype=dtype)
        if spec.init.kind == COMPUTED:
            whole = torch.zeros(shape) if computed is None else computed
        else:
            whole = self._drawn(spec, shape)
        part = self.cut(whole, spec, site) if self.cut else whole
        return part.to(device=device, dtype=dtype if part.is_floating_point() else part.dtype).contiguous()

    def _drawn(self, spec: TensorSpec, shape: tuple[int, ...]) -> torch.Tensor:
        seed, rule = self.variant.seed, self.variant.drawing_rule
        whole = spec.init.draw(shape, seed, spec.key, rule)
        if not spec.trained and spec.init.random:
            unit = spec.init.unit(shape)
            if spec.key in self.expected:
                check(spec.key, whole, unit, self.expected[spec.key], rule, seed)
            self.checksums[spec.key] = self.expected.get(spec.key) or record(whole, unit)
        return whole

    def tensors(self, site: Site) -> dict[str, torch.Tensor]:
        """The layer's tensors by the name its equation calls them."""
        # Looked up on the module each time: moving a module replaces its buffers.
        return {name: getattr(module, attribute) for name, (module, attribute) in self._parts[site].items()}

    def factors(self, site: Site, weight: FrozenWeight) -> Factors:
        """The layer's A (rank, in), B (out, rank) and scale."""
        return self.variant.factors(site, self.tensors(site), weight)

    def named_tensors(self) -> dict[str, torch.Tensor]:
        """Every tensor of the adapter by its key, each once."""
        return {key: getattr(module, attribute) for key, (module, attribute) in self._homes.items()}

    def kept(self, drawn: bool = False) -> dict[str, torch.Tensor]:
        """What an adapter file holds: every tensor that nothing else brings back.

        Args:
            drawn: also those that are drawn again, but for indices, which are the same bits wherever they are drawn.
        """
        specs, named = self._specs, self.named_tensors()
        return {
            key: tensor for key, tensor in named.items() if specs[key].stored or (drawn and tensor.is_floating_point())
        }

    def trained(self) -> dict[str, tuple[TensorSpec, nn.Parameter]]:
        """Every parameter of the adapter by its key, each once, with what it is."""
        return {
            key: (spec, module.get_parameter(name))
            for key, (module, name) in self._homes.items()
            if (spec := self._specs[key]).trained
        }
