"""``y += s · ((x Aᵀ) ⊙ u) Bᵀ`` as one autograd node."""

from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor


class Exchange(NamedTuple):
    """What ranks that share a layer do to x Aᵀ on the way forward, and to its gradient on the way back.

    Both take (tokens, rank) tensors, the first this rank's tokens of x and the second those of y, and give the other.
    """

    forward: Callable[[Tensor], Tensor]
    backward: Callable[[Tensor], Tensor]


class _Apply(torch.autograd.Function):
    """Adds into the base output instead of making another one, and keeps only what the wanted gradients need.

    With h = x Aᵀ (tokens, rank), g = dL/dy and d = s g B:

        dL/du = Σ d ⊙ h      dL/dh = d ⊙ u      dL/dx = dL/dh A      dL/dA = (dL/dh)ᵀ x
        dL/dB = s gᵀ (h ⊙ u)      dL/dy_base = g

    so x is kept only for a trained A, and h, which is rank wide, only for a trained u or B.
    """

    @staticmethod
    def forward(ctx, y, x, A, B, u, scale, exchange):
        h = x.reshape(-1, x.shape[-1]) @ A.T
        if exchange is not None:
            h = exchange.forward(h)
        ctx.scale, ctx.exchange, ctx.x_shape = scale, exchange, x.shape
        _, _, wants_A, wants_B, wants_u, _, _ = ctx.needs_input_grad
        ctx.save_for_backward(x if wants_A else None, h if wants_B or wants_u else None, A, B, u)
        flat, h = y.view(-1, y.shape[-1]), h if u is None else h * u
        if y._is_view():  # Megatron's row-parallel output is one; autograd lets nobody write into it
            return torch.addmm(flat, h, B.T, alpha=scale).view(y.shape)
        ctx.mark_dirty(y)
        flat.addmm_(h, B.T, alpha=scale)
        return y

    @staticmethod
    def backward(ctx, grad):
        x, h, A, B, u = ctx.saved_tensors
        _, wants_x, wants_A, wants_B, wants_u, _, _ = ctx.needs_input_grad
        g = grad.reshape(-1, grad.shape[-1])
        grad_x = grad_A = grad_B = grad_u = None
        if wants_x or wants_A or wants_u:
            grad_h = (g @ B).mul_(ctx.scale)
            grad_u = (grad_h * h).sum(0) if wants_u else None
            grad_h = grad_h if u is None else grad_h.mul_(u)
        if wants_x or wants_A:
            if ctx.exchange is not None:
                grad_h = ctx.exchange.backward(grad_h)
            grad_x = (grad_h @ A).view(ctx.x_shape) if wants_x else None
            grad_A = grad_h.T @ x.reshape(-1, x.shape[-1]) if wants_A else None
        if wants_B:
            grad_B = (g.T @ (h if u is None else h * u)).mul_(ctx.scale)
        return grad, grad_x, grad_A, grad_B, grad_u, None, None


def apply(
    y: Tensor,
    x: Tensor,
    A: Tensor,
    B: Tensor,
    scale: float,
    gain: Tensor | None = None,
    u: Tensor | None = None,
    bias: Tensor | None = None,
    exchange: Exchange | None = None,
) -> Tensor:
    """``y + scale · ((x Aᵀ) ⊙ u) Bᵀ``, written into ``y``; with a gain, that many times all of it but the bias.

    Args:
        y: output of the frozen layer, (..., out). Its dtype is the one computed in. Overwritten, unless it is a view.
        x: input of the frozen layer, (..., in).
        A: (rank, in). B: (out, rank). scale: s of the equation; it multiplies the product, never an activation.
        gain: (out,), or None for 1. u: (rank,), or None for 1; gradients of it are as partial as those of ``y``.
        bias: (out,), what of ``y`` the gain leaves alone; None if there is nothing.
        exchange: between ranks that each hold a part of A or B, or of the tokens.

    Returns:
        (..., out), dtype of ``y``.
    """
    dtype = y.dtype
    u = None if u is None else u.to(dtype)
    y = _Apply.apply(y.contiguous(), x.to(dtype), A.to(dtype), B.to(dtype), u, scale, exchange)
    if gain is None:
        return y
    gain = gain.to(dtype)
    return gain * y if bias is None else torch.addcmul((1 - gain) * bias.to(dtype), gain, y)
