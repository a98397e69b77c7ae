"""What any adapter amounts to, in plain LoRA's form: each layer's own pair of factors, whatever they were made of."""

from __future__ import annotations

from typing import NamedTuple, Protocol

import torch
from torch import Tensor

from nemo_tiedlora.checkpoint.adapter import Adapter
from nemo_tiedlora.checkpoint.merge import Changes
from nemo_tiedlora.errors import UsageError
from nemo_tiedlora.model.targets import rows, shape, whole
from nemo_tiedlora.variants import FrozenWeight
from nemo_tiedlora.variants.dora import row_norms


class Pair(NamedTuple):
    """What an adapter does to some rows of one linear layer's weight: ``W + scale · B A``.

    Args:
        A: (rank, in), float32. B: (rows, rank), float32.
        lengths: (rows,), float32; every row of ``W + scale · B A`` is then stretched to its length, as DoRA does.
            None: not.
    """

    A: Tensor
    B: Tensor
    lengths: Tensor | None

    def padded(self, rank: int) -> Pair:
        """The same with a larger rank."""
        more = rank - len(self.A)
        A, B = torch.nn.functional.pad(self.A, (0, 0, 0, more)), torch.nn.functional.pad(self.B, (0, more))
        return self._replace(A=A, B=B)


class Weights(Protocol):
    """Whatever has a base's weights: its file, or a model in memory."""

    def weight(self, path: str, layer: int) -> Tensor:
        """See ``BaseFile.weight``."""


class PlainLora:
    """An adapter as plain LoRA on the linear layers of its base.

    Args:
        base: only the weights that the method's equation reads are read.

    Attributes:
        scale: s of every layer.
    """

    def __init__(self, adapter: Adapter, base: Weights):
        self.adapter, self.base = adapter, base
        self.changes, self.scale = Changes(adapter), adapter.variant.scale

    def layers(self) -> list[int]:
        """The adapted layers, counted from 0."""
        return sorted({layer for _, layer in self.changes.sites})

    @torch.no_grad()
    def pair(self, path: str, layer: int, places: Tensor) -> Pair | None:
        """What it does to the rows ``places`` of a layer's weight; None where it leaves all of them as they are.

        Where several adapted matrices of a fused projection are among the rows, the pair's rank is the sum of theirs.
        """
        sites = self.changes.sites.get((path, layer), ())
        if not sites:
            return None
        reads = self.adapter.variant.reads_weight
        columns, height = shape(whole(path), self.adapter.shape)
        weight = self.base.weight(path, layer) if reads else torch.empty(height, columns, device="meta")
        As, Bs, gain, stretched = [], [], torch.ones(len(places)), False
        for site in sites:
            own = rows(site.target, self.adapter.shape)
            number = torch.full((height,), -1)  # of each row of the whole weight among those of this site
            number[slice(None) if own is None else own] = torch.arange(site.out_features)
            inside = number[places] >= 0
            if not inside.any():
                continue
            factors = self.changes.factors(site, FrozenWeight(weight, own)).folded()
            B = factors.B.new_zeros(len(places), factors.B.shape[1])
            B[inside] = factors.B[number[places][inside]] * (factors.scale / self.scale)
            As.append(factors.A)
            Bs.append(B)
            if factors.gain is not None:
                gain[inside], stretched = factors.gain[number[places][inside]], True
        if not As:
            return None
        A, B = torch.cat(As), torch.cat(Bs, 1)
        if not stretched:
            return Pair(A, B, None)
        return Pair(A, B, gain * row_norms(FrozenWeight(weight, places), A, B, self.scale))


def rounded(name: str, tensor: Tensor, dtype: torch.dtype) -> Tensor:
    """A copy of ``tensor`` in another type.

    Raises:
        UsageError: it has values that are too large for it.
    """
    made = tensor.to(dtype, copy=True, memory_format=torch.contiguous_format)
    if not made.isfinite().all():
        raise UsageError("dtype", str(dtype).removeprefix("torch."), f"{name} has values too large for it")
    return made
