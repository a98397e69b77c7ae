"""What a variant is: a source of factors.

Every method in this package is one equation,

    y = x Wᵀ + s · (x A_lᵀ) B_lᵀ        A_l: (rank, in)   B_l: (out, rank)

(times one gain per output feature, if DoRA is on) and a variant only says where layer l's A_l and B_l come from: it
names the tensors behind them and combines them. Creating, sharing, sharding, counting and saving those tensors, and
applying or merging the factors, is written once elsewhere and works for all.
"""

from abc import ABC, abstractmethod
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from math import prod
from typing import Any, Generic, Literal, NamedTuple, TypeVar

import torch
from torch import Tensor

from nemo_tiedlora.errors import UsageError
from nemo_tiedlora.variants.config import VariantConfig
from nemo_tiedlora.variants.init import COMPUTED, Init
from nemo_tiedlora.variants.weight import FrozenWeight

#: The factor that a tensor is a part of; empty for a part of neither.
Factor = Literal["A", "B", "u", ""]


@dataclass(frozen=True)
class Site:
    """One adapted linear layer, in whole (unsharded) sizes.

    Args:
        target: kind of target module, e.g. ``attention_qkv``; tensors are only ever tied within one kind.
        layer: 0-based number of the transformer layer in the whole model.
        in_features: columns of the frozen weight W (out, in).
        out_features: rows of W.
        routed: whether it sees the tokens that a router sends it, of any samples, and not whole samples.
    """

    target: str
    layer: int
    in_features: int
    out_features: int
    routed: bool = False


class Factors(NamedTuple):
    """What a layer does to its frozen weight: ``gain ⊙ (W + scale · B diag(u) A)``.

    A (rank, in), B (out, rank), a gain (out,) per row that only DoRA has, and u (rank,); None is 1. Where u is trained
    and A is not, nothing as large as the layer's input need be kept for u's gradient.
    """

    A: Tensor
    B: Tensor
    scale: float
    gain: Tensor | None = None
    u: Tensor | None = None

    def folded(self) -> "Factors":
        """The same with u in A."""
        return self if self.u is None else self._replace(A=self.u[:, None] * self.A, u=None)

    def detached(self) -> "Factors":
        """The same as constants."""
        gain, u = (part if part is None else part.detach() for part in (self.gain, self.u))
        return Factors(self.A.detach(), self.B.detach(), self.scale, gain, u)


@dataclass(frozen=True)
class TensorSpec:
    """One tensor behind a layer's factors.

    Args:
        key: its name in the whole model; layers that give the same key share the tensor.
        axes: what each dimension runs over: ``rank``, ``in`` or ``out``, or its size. Sharding follows from it.
        init: how it starts.
        trained: whether it gets gradients; a frozen random tensor is never saved but drawn again.
        factor: which factor of the layer it is a part of: ``A``, ``B`` or the ``u`` between them; empty for a part of
            neither. A tensor that is a part of both A and B is named twice, with the same key.
    """

    key: str
    axes: tuple[str | int, ...]
    init: Init
    trained: bool
    factor: Factor

    @property
    def stored(self) -> bool:
        """Whether an adapter file must hold it: nothing else brings it back."""
        return self.trained or self.init.kind == COMPUTED

    def shape(self, site: Site, rank: int) -> tuple[int, ...]:
        """Whole (unsharded) sizes."""
        sizes = {"rank": rank, "in": site.in_features, "out": site.out_features}
        return tuple(axis if isinstance(axis, int) else sizes[axis] for axis in self.axes)


class Alone:
    """One process: there is nothing to add up. Replaced where a sample, a layer or the data is spread over ranks."""

    def within(self, powers: Tensor) -> Tensor:
        """Σ|·|^p of each sample's whole values, from those of this rank's part: (parts, modules, samples)."""
        return powers

    def across(self, scores: Tensor) -> Tensor:
        """Every module's score from all samples and all layers, from those of this rank: (modules,)."""
        return scores


Config = TypeVar("Config", bound=VariantConfig)


class Variant(ABC, Generic[Config]):
    """A source of factors. Subclasses state their equation in ``factors`` and what it needs in ``tensors``.

    Args:
        config: the method's settings.
        layers: number of transformer layers in the whole model.
    """

    #: Whether ``factors`` reads the layer's frozen weight.
    reads_weight: bool = False
    #: Whether what trains depends on the optimizer steps taken, after each of which ``advance`` must be called.
    changes_with_step: bool = False
    #: Whether some modules can train while others wait: each has something of its own.
    takes_turns: bool = True
    config: Config

    def __init__(self, config: Config, layers: int):
        self.config = config
        self.layers = layers
        self.rank = config.rank
        self.seed = config.seed
        self.drawing_rule = config.drawing_rule

    @property
    def scale(self) -> float:
        """s of the equation."""
        return (self.config.alpha or self.rank) / self.rank

    @abstractmethod
    def tensors(self, site: Site) -> dict[str, TensorSpec]:
        """The tensors behind this layer's factors, by the name the equation calls them."""

    @abstractmethod
    def factors(self, site: Site, tensors: Mapping[str, Tensor], weight: FrozenWeight) -> Factors:
        """The equation: this layer's factors from its tensors and its frozen weight. Differentiable."""

    def computed(self, site: Site, weight: FrozenWeight) -> dict[str, Tensor]:
        """Start values of the tensors whose init is ``COMPUTED``, whole, by the name the equation calls them."""
        return {}

    def decided(self) -> dict[str, Any]:
        """Settings that were worked out from others or read from a file, to be saved with the adapter."""
        return {}

    def final_at_merge(self) -> str | None:
        """Why what is merged into a weight cannot be told from the result; None if it can."""
        return None

    def start(self, sites: Iterable[Site]) -> None:
        """All of the whole model's adapted layers, in order; called once, before any has its tensors."""

    def trained_at_once(self, sites: Iterable[Site]) -> int | None:
        """How many parameters get gradients in one step, on average; None where that cannot be said beforehand."""
        return count(self, sites).trainable

    @property
    def observes(self) -> bool:
        """Whether ``observe`` is to be called."""
        return False

    def observe(self, site: Site, output: Tensor) -> None:
        """An adapted layer's output, (samples, ..., out), in a pass that counts."""

    @property
    def parts(self) -> tuple[str, ...]:
        """What scores are made of that are added up over ranks: ``output``, or the gradients of ``A`` and ``B``."""
        return ()

    @property
    def own_schedules(self) -> bool:
        """Whether each tensor follows the learning-rate schedule by the steps that it was active for."""
        return False

    def active_keys(self) -> set[str] | None:
        """Keys of the tensors that train in this step; None: all."""
        return None

    def advance(self, ranks: Alone | None = None) -> None:
        """An optimizer step was taken.

        Args:
            ranks: adds up scores over processes; None: there is one.
        """

    def state_dict(self) -> dict[str, Any]:
        """All that decides how it goes on; JSON can hold it."""
        return {}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Go on from what ``state_dict`` gave, after ``start``."""

    def history(self) -> dict[str, Any]:
        """What was chosen when, for people; JSON can hold it. Empty where nothing is chosen."""
        return {}

    def check(self, site: Site) -> None:
        """Raise ``UsageError`` if the variant cannot adapt this layer."""
        smallest = min(site.in_features, site.out_features)
        if self.rank > smallest:
            shape = f"{site.target} of shape ({site.out_features}, {site.in_features})"
            raise UsageError("rank", self.rank, f"larger than the layer: {shape} allows 1 to {smallest}")


class Wrapper(Variant[Config]):
    """A variant that changes something about another one, whatever that is, and leaves all else to it."""

    def __init__(self, config: Config, inner: Variant):
        super().__init__(config, inner.layers)
        self.inner = inner
        self.rank, self.seed, self.drawing_rule = inner.rank, inner.seed, inner.drawing_rule
        self.reads_weight = self.reads_weight or inner.reads_weight
        self.changes_with_step = self.changes_with_step or inner.changes_with_step
        self.takes_turns = self.takes_turns and inner.takes_turns

    @property
    def scale(self) -> float:
        return self.inner.scale

    def tensors(self, site: Site) -> dict[str, TensorSpec]:
        return self.inner.tensors(site)

    def factors(self, site: Site, tensors: Mapping[str, Tensor], weight: FrozenWeight) -> Factors:
        return self.inner.factors(site, tensors, weight)

    def computed(self, site: Site, weight: FrozenWeight) -> dict[str, Tensor]:
        return self.inner.computed(site, weight)

    def decided(self) -> dict[str, Any]:
        return self.inner.decided()

    def final_at_merge(self) -> str | None:
        return self.inner.final_at_merge()

    def start(self, sites: Iterable[Site]) -> None:
        self.inner.start(sites)

    @property
    def observes(self) -> bool:
        return self.inner.observes

    def observe(self, site: Site, output: Tensor) -> None:
        self.inner.observe(site, output)

    @property
    def parts(self) -> tuple[str, ...]:
        return self.inner.parts

    @property
    def own_schedules(self) -> bool:
        return self.inner.own_schedules

    def active_keys(self) -> set[str] | None:
        return self.inner.active_keys()

    def advance(self, ranks: Alone | None = None) -> None:
        self.inner.advance(ranks)

    def state_dict(self) -> dict[str, Any]:
        return self.inner.state_dict()

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.inner.load_state_dict(state)

    def history(self) -> dict[str, Any]:
        return self.inner.history()

    def check(self, site: Site) -> None:
        self.inner.check(site)


class Part(NamedTuple):
    """What the dimensions of a part run over, and the factor it belongs to."""

    axes: tuple[str, ...]
    factor: Factor

    def spec(self, key: str, init: Init, trained: bool = True) -> TensorSpec:
        return TensorSpec(key, self.axes, init, trained, self.factor)


#: The parts of the methods that scale a pair of matrices: ``A_l = diag(u) A`` and ``B_l = diag(v) B``.
PARTS = {
    "A": Part(("rank", "in"), "A"),
    "B": Part(("out", "rank"), "B"),
    "u": Part(("rank",), "u"),
    "v": Part(("out",), "B"),
}


def merged(weight: Tensor, factors: Factors) -> Tensor:
    """``gain ⊙ (W + s B diag(u) A)``, the weight (out, in) that does alone what the layer and its adapter do."""
    A, B, scale, gain, _ = factors.folded()
    whole = torch.addmm(weight, B, A, alpha=scale)
    return whole if gain is None else gain[:, None] * whole


def scaled(tensors: Mapping[str, Tensor], scale: float) -> Factors:
    """``diag(u) A`` and ``diag(v) B``; a part that is not there is 1. v costs nothing in B, u little after ``x Aᵀ``."""
    B = tensors["B"]
    return Factors(tensors["A"], tensors["v"][:, None] * B if "v" in tensors else B, scale, u=tensors.get("u"))


class Count(NamedTuple):
    """Numbers of parameters: trained; frozen random ones, drawn again instead of being saved; and frozen computed ones,
    which are saved."""

    trainable: int
    frozen: int
    computed: int = 0


def count(variant: Variant, sites: Iterable[Site]) -> Count:
    """Count a variant's parameters from shapes alone, each shared tensor once."""
    sizes: dict[str, tuple[TensorSpec, int]] = {}
    for site in sites:
        for spec in variant.tensors(site).values():
            sizes[spec.key] = spec, prod(spec.shape(site, variant.rank))
    return Count(
        trainable=sum(size for spec, size in sizes.values() if spec.trained),
        frozen=sum(size for spec, size in sizes.values() if not spec.stored),
        computed=sum(size for spec, size in sizes.values() if spec.stored and not spec.trained),
    )
