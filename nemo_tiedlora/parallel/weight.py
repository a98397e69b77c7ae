"""Products with a frozen weight of which every tensor rank holds a part.

Sums over the sharded axis are completed over the ranks; they are formed once per optimizer step.
"""

import torch
from torch import Tensor

from nemo_tiedlora.parallel.exchange import all_reduce
from nemo_tiedlora.variants import FrozenWeight


class ShardedWeight(FrozenWeight):
    """This rank's part of W, cut along ``out`` (column) or ``in`` (row).

    Args:
        parallel: ``column`` or ``row``.
        sequence_parallel: the gradients of factors are of this rank's tokens only.
    """

    def __init__(self, tensor: Tensor, rows: Tensor | None, parallel: str, sequence_parallel: bool):
        super().__init__(tensor, rows)
        self.column = parallel == "column"
        self.sequence_parallel = sequence_parallel

    def left(self, X: Tensor) -> Tensor:
        product = super().left(X)
        return all_reduce(product) if self.column else product

    def left_gradient(self, grad: Tensor) -> Tensor:
        # θ_A's part needs every token's gradient of A if A was summed over the ranks; else parts are added up later.
        return super().left_gradient(all_reduce(grad) if self.column and self.sequence_parallel else grad)

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
