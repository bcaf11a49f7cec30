"""RMS norm and layer norm with frozen weights: the output, and the gradient of the input alone."""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable


class Norm(NamedTuple):
    """What a norm multiplies by. `weight` (n,) or (heads, n) is at least float32; `centred` also takes the mean off."""

    weight: Tensor
    eps: float
    centred: bool = False


def norm(x: Tensor, spec: Norm) -> Tensor:
    """The norm over the last dimension of x, computed in at least float32, in x's dtype.

    Semantics:
        x = x - mean(x)                                   if centred (layer norm, arXiv:1607.06450)
        y = weight · x / sqrt(mean(x²) + eps)             (RMS norm, arXiv:1910.07467)
    """
    standard, _ = _standard(x, spec)
    return standard.mul_(spec.weight).to(x.dtype)


def norm_backward(dy: Tensor, x: Tensor, spec: Norm) -> Tensor:
    """The gradient of x, in x's dtype. The statistics are computed again: that is cheaper than to keep them."""
    standard, factor = _standard(x, spec)
    dx = dy.to(factor.dtype) * spec.weight
    along = torch.linalg.vecdot(dx, standard)[..., None] / x.shape[-1]
    if spec.centred:
        dx -= dx.mean(-1, keepdim=True)
    return dx.addcmul_(standard, along, value=-1).mul_(factor).to(x.dtype)


def _standard(x: Tensor, spec: Norm) -> tuple[Tensor, Tensor]:
    """x with a mean square of 1, a tensor of its own, and the factor (..., 1) that made it so."""
    wide = x.to(torch.promote_types(x.dtype, torch.float32))
    if spec.centred:
        wide = wide - wide.mean(-1, keepdim=True)
    squares = torch.linalg.vector_norm(wide, dim=-1, keepdim=True).square_()
    factor = (squares / x.shape[-1]).add_(spec.eps).rsqrt_()
    return wide * factor, factor


class _Normed(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, spec: Norm) -> Tensor:
        ctx.save_for_backward(x)
        ctx.spec = spec
        return norm(x, spec)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor, None]:  # pyright: ignore[reportIncompatibleMethodOverride]
        return norm_backward(gradients[0], ctx.saved_tensors[0], ctx.spec), None


def normed(x: Tensor, spec: Norm) -> Tensor:
    """`norm`, attached to autograd; keeps x alone."""
    return _Normed.apply(x, spec)  # pyright: ignore[reportReturnType]  # torch types it as Any
