"""A layer's frozen weight as methods read it. Another host's, spread over processes, gives the same of all of it."""

import torch
from torch import Tensor


class FrozenWeight:
    """A layer's frozen W (out, in), or some rows of a fused one; copied out only when it is asked for.

    Args:
        tensor: the stored weight.
        rows: indices of the rows that are this layer's; None means all.
    """

    def __init__(self, tensor: Tensor, rows: Tensor | None = None):
        self.tensor, self.rows = tensor, rows

    def __call__(self, dtype: torch.dtype) -> Tensor:
        weight = self.tensor.detach()
        return (weight if self.rows is None else weight[self.rows]).to(dtype)

    def left(self, X: Tensor) -> Tensor:
        """``Xᵀ W`` for X (out, k): (k, in)."""
        return X.T @ self(X.dtype)

    def left_gradient(self, grad: Tensor) -> Tensor:
        """dL/dX (out, k) of ``left`` from dL/d(XᵀW) (k, in)."""
        return self(grad.dtype) @ grad.T

    def turned(self, X: Tensor) -> Tensor:
        """``Xᵀ Wᵀ`` of a square W for X (in, k): (k, in)."""
        return (self(X.dtype) @ X).T

    def turned_gradient(self, grad: Tensor) -> Tensor:
        """dL/dX (in, k) of ``turned`` from dL/d(XᵀWᵀ) (k, in)."""
        return self(grad.dtype).T @ grad.T

    def right(self, X: Tensor) -> Tensor:
        """``W X`` for X (in, k): (out, k)."""
        return self(X.dtype) @ X

    def right_gradient(self, grad: Tensor) -> Tensor:
        """dL/dX (in, k) of ``right`` from dL/d(WX) (out, k)."""
        return self(grad.dtype).T @ grad

    def gram(self, A: Tensor) -> Tensor:
        """``A Aᵀ`` for A (rank, in): (rank, rank)."""
        return A @ A.T

    def squared_rows(self, dtype: torch.dtype) -> Tensor:
        """The squared length of every row of W: (out,)."""
        return self(dtype).square().sum(1)

    def whole(self, dtype: torch.dtype) -> Tensor:
        """All of W (out, in), also where this process holds a part of it; on all of its ranks at once."""
        return self(dtype)

    def row_lengths(self, dtype: torch.dtype) -> Tensor:
        """The length of every row of all of W: (out,)."""
        return self.squared_rows(dtype).sqrt()

    @property
    def version(self) -> int:
        """Counts in-place changes."""
        return self.tensor._version
