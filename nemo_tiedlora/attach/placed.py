"""A site on the linear layers of a torch model: one layer, some rows of one, or several layers that are one matrix.

The layers stay where and what they are: their outputs are changed by forward hooks, and the adapter's tensors live on a
module named ``adapter`` inside the first of a site's layers. So the model's own weights keep their names.
"""

from functools import partial
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from nemo_tiedlora.errors import UsageError
from nemo_tiedlora.ops import apply
from nemo_tiedlora.variants import Bank, Factors, FrozenWeight, Site, merged

#: What the module with a site's tensors is called inside the site's first linear layer.
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
    """A linear layer's weight (out, in), which shares the layer's memory."""
    weight = linear.weight.detach()
    return weight.T if is_transposed(linear) else weight


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
        super().__init__(place.spans[0].linear.weight)
        self.place = place

    def __call__(self, dtype: torch.dtype) -> Tensor:
        site, spans = self.place
        if spans[0].rows is None:
            return by_rows(spans[0].linear).to(dtype)
        made = self.tensor.new_empty(site.out_features, site.in_features, dtype=dtype)
        for span in spans:
            weight = by_rows(span.linear)
            made[span.rows] = (weight if span.inside is None else weight[span.inside]).to(dtype)
        return made

    @property
    def version(self) -> int:
        return sum(span.linear.weight._version for span in self.place.spans)


class Placed(nn.Module):
    """A site's tensors, as far as no earlier site has them, and what they do to the outputs of the site's layers.

    Args:
        bank: of the adapter.
        dropout: on the adapter's input.

    Attributes:
        enabled: whether outputs are changed.

    Raises:
        UsageError: the rank does not fit, or the layer's weight is not made of floating-point numbers.
    """

    def __init__(self, place: Place, bank: Bank, dropout: float):
        super().__init__()
        self.place, self.bank, self.dropout, self.enabled = place, bank, dropout, True
        for number, span in enumerate(place.spans):
            weight = span.linear.weight
            if not weight.is_floating_point():
                way_out = (
                    f"its weight is of type {str(weight.dtype).removeprefix('torch.')}; load the model unquantised"
                )
                raise UsageError("targets", span.name, way_out)
            for kind in ("inside", "rows"):
                index = getattr(span, kind)
                # Buffers go where the model goes.
                self.register_buffer(
                    f"{kind}_{number}", None if index is None else index.to(weight.device), persistent=False
                )
        bank.adopt(self, place.site, self.weight())
        self._handles: list[Any] = []
        #: Of the pass that is under way: which spans took the factors, the factors, and the spans' outputs.
        self._taken: set[int] = set()
        self._formed: Factors | None = None
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
        """Several sites can begin on the same fused layer."""
        return NAME if self.place.spans[0].inside is None else f"{NAME}_{self.place.site.target}"

    def weight(self) -> FrozenWeight:
        """The site's frozen weight."""
        return PlacedWeight(self.place)

    def factors(self) -> Factors:
        """The site's A, B, scale and gain."""
        return self.bank.factors(self.place.site, self.weight())

    def _adapt(self, number: int, linear: Any, args: tuple, kwargs: dict[str, Any], output: Tensor):
        """A layer's output (samples, ..., out) with the site's factors applied to the rows that are the site's."""
        if not self.enabled:
            return output
        x = args[0] if args else next(iter(kwargs.values()))
        A, B, scale, gain, u = self._shared(number)
        rows, inside = self._index("rows", number), self._index("inside", number)
        if rows is not None:
            B, gain = B[rows], None if gain is None else gain[rows]
        if inside is not None:
            out = output.shape[-1]
            B = B.new_zeros(out, B.shape[1]).index_copy(0, inside, B)
            gain = None if gain is None else gain.new_ones(out).index_copy(0, inside, gain)
        output = apply(output, F.dropout(x, self.dropout, self.training), A, B, scale, gain, u, linear.bias)
        if self.training and self.bank.variant.observes:
            self._observe(number, output if inside is None else output[..., inside])
        return output

    def _index(self, kind: str, number: int) -> Tensor | None:
        return self._buffers[f"{kind}_{number}"]

    def _shared(self, number: int) -> Factors:
        """The factors of this pass, formed once for all spans: a method that watches their gradients sees the sum."""
        if number in self._taken or self._with_gradients != torch.is_grad_enabled():
            self._taken, self._formed = set(), None  # another pass, perhaps after one that was broken off
        formed = self._formed or self.factors()
        self._with_gradients = torch.is_grad_enabled()
        self._taken.add(number)
        done = len(self._taken) == len(self.place.spans)
        self._taken, self._formed = (set(), None) if done else (self._taken, formed)
        return formed

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
    def write(self, sign: int = 1) -> None:
        """Put the factors into the layers' weights, formed in at least float32; with sign -1, take them out again."""
        weight = self.weight()
        precise = torch.promote_types(weight.tensor.dtype, torch.float32)
        A, B, scale, gain, u = self.factors()
        gain, u = (part if part is None else part.to(precise) for part in (gain, u))
        factors = Factors(A.to(precise), B.to(precise), sign * scale, gain, u)
        whole = merged(weight(precise), factors).to(weight.tensor.dtype)
        for span in self.place.spans:
            part = whole if span.rows is None else whole[span.rows]
            by_rows(span.linear)[slice(None) if span.inside is None else span.inside] = part
