"""A site on the linear layers of a torch model: one layer, some rows of one, or several layers that are one matrix.

The layers stay where and what they are: their outputs are changed by forward hooks, and the adapter's tensors live on a
module named ``adapter`` inside the first of a site's layers. So the model's own weights keep their names.
"""

from collections.abc import Callable, Iterable, Iterator
from functools import partial
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from nemo_tiedlora.attach import quantised
from nemo_tiedlora.errors import UsageError
from nemo_tiedlora.ops import apply
from nemo_tiedlora.variants import Bank, Factors, FrozenWeight, Site, merged

if TYPE_CHECKING:
    from nemo_tiedlora.attach.together import Adapters

#: An adapter's name, if nothing is said; and what the module with a site's tensors is called inside the site's first
#: linear layer, followed by any other name.
NAME = "adapter"


def sizes(module: Any) -> tuple[int, int] | None:
    """(in, out) of a linear layer, also of transformers' ``Conv1D``; None of any other module."""
    if isinstance(module, nn.Linear):
        return module.in_features, module.out_features
    if is_transposed(module):
        return tuple(module.weight.shape)
    return None


def is_transposed(module: nn.Module) -> bool:
    """Whether it is a linear layer whose weight is (in, out): transformers' ``Conv1D``."""
    kind = type(module)
    return kind.__name__ == "Conv1D" and kind.__module__ == "transformers.pytorch_utils"


def by_rows(linear: Any) -> Tensor:
    """A linear layer's weight (out, in), which shares the layer's memory; of a quantised one a copy, and of one that
    ``fully_shard`` has spread over processes too, which all of them ask for at once."""
    if quantised.kind(linear):
        return quantised.dequantised(linear)
    weight = linear.weight.detach()
    if is_sharded(weight):
        weight = weight.full_tensor()
    return weight.T if is_transposed(linear) else weight


def is_sharded(weight: Any) -> bool:
    """Whether it is a DTensor, whose module need not be imported for that."""
    return hasattr(weight, "full_tensor")


def is_spread(model: nn.Module) -> bool:
    """Whether ``fully_shard`` has spread some of it over processes."""
    return any(kind.__name__ == "FSDPModule" for module in model.modules() for kind in type(module).__mro__)


class Span(NamedTuple):
    """Rows of a linear layer that are rows of a site.

    Args:
        name: the layer's, in the model.
        inside: their numbers in the layer; None: all, in order.
        rows: their numbers in the site's weight; None: all, in order.
    """

    name: str
    linear: Any
    inside: Tensor | None = None
    rows: Tensor | None = None


class Place(NamedTuple):
    """A site and where it lies: every row of it is in one span."""

    site: Site
    spans: tuple[Span, ...]


class PlacedWeight(FrozenWeight):
    """A site's frozen W (out, in), in the order of the site's rows, out of all the layers that it lies on."""

    def __init__(self, place: Place):
        linear = place.spans[0].linear
        super().__init__(quantised.like(linear) if quantised.kind(linear) else linear.weight)
        self.place = place

    def __call__(self, dtype: torch.dtype) -> Tensor:
        return self._by_span(self.place.site.in_features, dtype, lambda weight: weight)

    def _by_span(self, width: int, dtype: torch.dtype, form: Callable[[Tensor], Tensor]) -> Tensor:
        """What ``form`` makes of each span's rows of W, (rows, width), in the order of the site's rows."""
        site, spans = self.place
        if spans[0].rows is None:
            return form(by_rows(spans[0].linear).to(dtype))
        made = torch.empty(site.out_features, width, dtype=dtype, device=self.tensor.device)
        for rows, weight in self._parts(dtype):
            made[rows] = form(weight)
        return made

    def _parts(self, dtype: torch.dtype) -> Iterator[tuple[Any, Tensor]]:
        """Each span's rows in the site and in W. Whole layers are not copied, as joining them would."""
        for span in self.place.spans:
            weight = by_rows(span.linear)
            rows = slice(None) if span.rows is None else span.rows
            yield rows, (weight if span.inside is None else weight[span.inside]).to(dtype)

    def left(self, X: Tensor) -> Tensor:
        return _sum(X[rows].T @ weight for rows, weight in self._parts(X.dtype))

    def left_gradient(self, grad: Tensor) -> Tensor:
        return self._by_span(len(grad), grad.dtype, lambda weight: weight @ grad.T)

    def turned(self, X: Tensor) -> Tensor:
        return self.right(X).T

    def turned_gradient(self, grad: Tensor) -> Tensor:
        return self.right_gradient(grad.T)

    def right(self, X: Tensor) -> Tensor:
        return self._by_span(X.shape[1], X.dtype, lambda weight: weight @ X)

    def right_gradient(self, grad: Tensor) -> Tensor:
        return _sum(weight.T @ grad[rows] for rows, weight in self._parts(grad.dtype))

    def squared_rows(self, dtype: torch.dtype) -> Tensor:
        return self._by_span(1, dtype, lambda weight: weight.square().sum(1, keepdim=True))[:, 0]

    @property
    def version(self) -> int:
        return sum(span.linear.weight._version for span in self.place.spans)


def _sum(parts: Iterator[Tensor]) -> Tensor:
    """Of one part at least; the first is written over."""
    total = next(parts)
    for part in parts:
        total += part
    return total


class Placed(nn.Module):
    """A site's tensors, as far as no earlier site has them, and what they do to the outputs of the site's layers.

    Args:
        bank: of the adapter.
        dropout: on the adapter's input.
        name: the adapter's.

    Attributes:
        adapters: all that are on the model.
        enabled: whether outputs are changed.
        share: how much of the change is made. alone: whether no other adapter is active.

    Raises:
        UsageError: the rank does not fit, or the layer's weight is made neither of floating-point numbers nor by
            bitsandbytes.
    """

    adapters: "Adapters"

    def __init__(self, place: Place, bank: Bank, dropout: float, name: str = NAME):
        super().__init__()
        self.place, self.bank, self.dropout, self.name = place, bank, dropout, name
        self.enabled, self.share, self.alone = True, 1.0, True
        for number, span in enumerate(place.spans):
            weight = span.linear.weight
            if not weight.is_floating_point() and not quantised.kind(span.linear):
                what = f"its weight is of type {str(weight.dtype).removeprefix('torch.')}"
                way_out = f"{what}; load the model unquantised, or quantised by bitsandbytes"
                raise UsageError("targets", span.name, way_out)
            for kind in ("inside", "rows"):
                index = getattr(span, kind)
                # Buffers go where the model goes.
                self.register_buffer(
                    f"{kind}_{number}", None if index is None else index.to(weight.device), persistent=False
                )
        bank.adopt(self, place.site, self.weight())
        self._handles: list[Any] = []
        #: Of the pass that is under way: which spans took the factors, the factors, what was dropped from which input,
        #: and the spans' outputs.
        self._taken: set[int] = set()
        self._formed: Factors | None = None
        self._dropped: tuple[Tensor, Tensor] | None = None
        self._with_gradients = False
        self._outputs: dict[int, Tensor] = {}

    def put(self) -> None:
        """Go onto the site's layers."""
        for number, span in enumerate(self.place.spans):
            self._handles.append(span.linear.register_forward_hook(partial(self._adapt, number), with_kwargs=True))
        first = self.place.spans[0].linear
        first.add_module(self._name(), self.train(first.training))

    def take_off(self) -> None:
        """Leave the site's layers as they were."""
        for handle in self._handles:
            handle.remove()
        self._handles.clear()
        self.place.spans[0].linear._modules.pop(self._name(), None)

    def _name(self) -> str:
        """Several sites can begin on the same fused layer. No name of an adapter has a hyphen in it."""
        name = NAME if self.name == NAME else f"{NAME}-{self.name}"
        return name if self.place.spans[0].inside is None else f"{name}_{self.place.site.target}"

    def weight(self) -> FrozenWeight:
        """The site's frozen weight."""
        return PlacedWeight(self.place)

    def factors(self) -> Factors:
        """The site's A, B, scale and gain, in the tensors' own dtype, also where a model computes in another."""
        weight = self.weight()
        with torch.autocast(weight.tensor.device.type, enabled=False):
            return self.bank.factors(self.place.site, weight)

    def _adapt(self, number: int, linear: Any, args: tuple, kwargs: dict[str, Any], output: Tensor):
        """A layer's output (samples, ..., out) with the site's factors applied to the rows that are the site's."""
        if not self.enabled:
            return output
        x = args[0] if args else next(iter(kwargs.values()))
        (A, B, scale, gain, u), dropped = self._shared(number, x)
        rows, inside = self._index("rows", number), self._index("inside", number)
        if rows is not None:
            B, gain = B[rows], None if gain is None else gain[rows]
        if inside is not None:
            out = output.shape[-1]
            B = B.new_zeros(out, B.shape[1]).index_copy(0, inside, B)
            gain = None if gain is None else gain.new_ones(out).index_copy(0, inside, gain)
        if gain is None:
            output = apply(output, dropped, A, B, self.share * scale, None, u)
        elif self.alone and self.share == 1:
            output = apply(output, dropped, A, B, scale, gain, u, linear.bias)
        else:  # a gain is of the frozen layer's output, to which others have added
            frozen = linear.forward(*args, **kwargs)
            changed = apply(frozen.clone(), dropped, A, B, scale, gain, u, linear.bias)
            output = torch.add(output, changed - frozen, alpha=self.share)
        if self.training and self.bank.variant.observes:
            self._observe(number, output if inside is None else output[..., inside])
        return output

    def _index(self, kind: str, number: int) -> Tensor | None:
        return self._buffers[f"{kind}_{number}"]

    def _shared(self, number: int, x: Tensor) -> tuple[Factors, Tensor]:
        """The factors of this pass, formed once for all spans: a method that watches their gradients sees the sum; and
        the input with values dropped, the same ones for all spans, as they are one layer's."""
        if number in self._taken or self._with_gradients != torch.is_grad_enabled():
            self._forget()  # another pass, perhaps after one that was broken off
        formed = self._formed or self.factors()
        if self._dropped is None or self._dropped[0] is not x:
            self._dropped = x, F.dropout(x, self.dropout, self.training)
        dropped = self._dropped[1]
        self._with_gradients = torch.is_grad_enabled()
        self._taken.add(number)
        self._formed = formed
        if len(self._taken) == len(self.place.spans):
            self._forget()
        return formed, dropped

    def _forget(self) -> None:
        self._taken, self._formed, self._dropped = set(), None, None

    def _observe(self, number: int, output: Tensor) -> None:
        site, spans = self.place
        if spans[0].rows is None:
            self.bank.variant.observe(site, output)
            return
        if number in self._outputs:
            self._outputs.clear()
        self._outputs[number] = output.detach()
        if len(self._outputs) == len(spans):
            joined = output.new_empty(*output.shape[:-1], site.out_features)
            for span, part in self._outputs.items():
                joined[..., self._index("rows", span)] = part
            self._outputs.clear()
            self.bank.variant.observe(site, joined)

    @torch.no_grad()
    def change(self) -> Tensor:
        """What the factors add to the site's frozen weight, (out, in), formed in at least float32."""
        weight = self.weight()
        precise = torch.promote_types(weight.tensor.dtype, torch.float32)
        A, B, scale, gain, u = self.factors()
        gain, u = (part if part is None else part.to(precise) for part in (gain, u))
        factors = Factors(A.to(precise), B.to(precise), scale, gain, u)
        if gain is None:
            return scale * (factors.B @ factors.folded().A)
        frozen = weight(precise)
        return merged(frozen, factors) - frozen


@torch.no_grad()
def write(sites: Iterable[tuple[Placed, float]]) -> None:
    """Put sites' changes, each so many times, into their layers' weights: all of them are changes of the weights as
    they are before.

    Raises:
        UsageError: one of the layers cannot be written to; then none is.
    """
    sites = list(sites)
    for span in (span for placed, _ in sites for span in placed.place.spans):
        if is_sharded(span.linear.weight):
            way_out = "its weight is spread over processes; save the adapter, and merge it on one"
            raise UsageError("model", span.name, way_out)
        if quantised.kind(span.linear):
            way_out = "its weight is quantised, and would lose what is merged; merge into the unquantised model"
            raise UsageError("model", span.name, f"{way_out}, onto which load(..., force=True) takes the adapter")
    for group in _sharing(sites):
        made: dict[Any, Tensor] = {}
        for placed, times in group:
            change = placed.change()
            for span in placed.place.spans:
                if span.linear not in made:
                    made[span.linear] = by_rows(span.linear).to(change.dtype, copy=True)
                rows, inside = (slice(None) if index is None else index for index in (span.rows, span.inside))
                made[span.linear][inside] += times * change[rows]
        for linear, whole in made.items():
            by_rows(linear).copy_(whole)


def _sharing(sites: Iterable[tuple[Placed, float]]) -> list[list[tuple[Placed, float]]]:
    """Those that have layers in common together, so that only a few weights are in memory twice."""
    groups: list[tuple[set[int], list[tuple[Placed, float]]]] = []
    for site in sites:
        layers, members = {id(span.linear) for span in site[0].place.spans}, [site]
        for group in [group for group in groups if group[0] & layers]:
            groups.remove(group)
            layers, members = layers | group[0], group[1] + members
        groups.append((layers, members))
    return [members for _, members in groups]
