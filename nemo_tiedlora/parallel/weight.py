"""Products with a frozen weight of which every tensor rank holds a part.

Sums over the sharded axis are completed over the ranks; they are formed once per optimizer step.
"""

import torch
from torch import Tensor

from nemo_tiedlora.parallel.cut import tensor_ranks
from nemo_tiedlora.parallel.exchange import all_gather, all_reduce
from nemo_tiedlora.variants import FrozenWeight


class ShardedWeight(FrozenWeight):
    """This rank's part of W, cut along ``out`` (column) or ``in`` (row).

    Args:
        parallel: ``column`` or ``row``.
        sequence_parallel: the gradients of factors are of this rank's tokens only.
        blocks: how many matrices are stacked in W, each cut on its own.
    """

    def __init__(
        self, tensor: Tensor, rows: Tensor | None, parallel: str, sequence_parallel: bool = False, blocks: int = 1
    ):
        super().__init__(tensor, rows)
        self.column = parallel == "column"
        self.sequence_parallel, self.blocks = sequence_parallel, blocks

    def left(self, X: Tensor) -> Tensor:
        product = super().left(X)
        return all_reduce(product) if self.column else product

    def left_gradient(self, grad: Tensor) -> Tensor:
        # θ_A's part needs every token's gradient of A if A was summed over the ranks; else parts are added up later.
        return super().left_gradient(all_reduce(grad) if self.column and self.sequence_parallel else grad)

    def turned(self, X: Tensor) -> Tensor:
        product, (ranks, rank) = super().turned(X).T, tensor_ranks()
        if self.column:  # each rank has some rows of the whole product
            return self._joined(product).T
        return all_reduce(product).chunk(ranks)[rank].T

    def turned_gradient(self, grad: Tensor) -> Tensor:
        ranks, rank = tensor_ranks()
        if not self.column:
            return super().turned_gradient(all_gather(grad.T).T)
        whole = (all_reduce(grad) if self.sequence_parallel else grad).T
        own = whole.reshape(self.blocks, ranks, -1, whole.shape[1])[:, rank].flatten(0, 1)
        product = super().turned_gradient(own.T)
        return product if self.sequence_parallel else all_reduce(product)  # else the parts are added up later

    def whole(self, dtype: torch.dtype) -> Tensor:
        own = self(dtype)
        return self._joined(own) if self.column else self._joined(own.T).T

    def row_lengths(self, dtype: torch.dtype) -> Tensor:
        own = super().row_lengths(dtype)  # of whole rows, whichever way W is cut
        return self._joined(own[:, None])[:, 0] if self.column else own

    def _joined(self, own: Tensor) -> Tensor:
        """The whole (size, k) from every rank's own rows of it."""
        parts = all_gather(own).view(tensor_ranks()[0], self.blocks, -1, own.shape[1])
        return parts.transpose(0, 1).flatten(0, 2)

    def right(self, X: Tensor) -> Tensor:
        product = super().right(X)
        return product if self.column else all_reduce(product)

    def right_gradient(self, grad: Tensor) -> Tensor:
        return super().right_gradient(all_reduce(grad) if not self.column and self.sequence_parallel else grad)

    def gram(self, A: Tensor) -> Tensor:
        product = super().gram(A)
        return product if self.column else all_reduce(product)

    def squared_rows(self, dtype: torch.dtype) -> Tensor:
        squares = super().squared_rows(dtype)
        return squares if self.column else all_reduce(squares)
