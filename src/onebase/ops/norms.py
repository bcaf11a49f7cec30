"""RMS norm and layer norm with frozen weights: the output, and the gradient of the input alone."""

from __future__ import annotations

from math import prod
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from onebase.ops import kernels
from onebase.ops.kernels import natively


class Norm(NamedTuple):
    """What a norm multiplies by. `weight` (n,) or (heads, n) is at least float32; `centred` also takes the mean off."""

    weight: Tensor
    eps: float
    centred: bool = False


def _kernel_spec(x: Tensor, spec: Norm) -> kernels.Norm | None:
    """A norm of x's last dimension as the kernels take it; None where they do not."""
    shape, shared = spec.weight.shape, spec.weight.ndim == 1
    usual = spec.weight.dtype == torch.float32 and spec.weight.is_contiguous() and x.ndim > 1
    if not usual or (x.shape[-1:] if shared else x.shape[1:]) != shape:
        return None
    heads = prod(x.shape[1:-1])
    return kernels.Norm(spec.weight.data_ptr(), heads, x.shape[-1], shared, spec.centred, spec.eps)


def _native_norm(x: Tensor, spec: Norm) -> Tensor:
    made = _kernel_spec(x, spec)
    if made is None or not kernels.by_row(x):
        return NotImplemented
    y = torch.empty(x.shape, dtype=x.dtype)
    kernels.call("norm", x, kernels.rows(y), kernels.rows(x), made, x.shape[0])
    return y


def _native_norm_backward(dy: Tensor, x: Tensor, spec: Norm, more: Tensor | None = None) -> Tensor:
    made = _kernel_spec(x, spec)
    if made is None or not kernels.by_row(dy, x, more) or dy.dtype != x.dtype:
        return NotImplemented
    dx = torch.empty(x.shape, dtype=x.dtype)
    kernels.call("norm_backward", x, *map(kernels.rows, (dx, dy, x, more)), made, x.shape[0])
    return dx


@natively(_native_norm)
def norm(x: Tensor, spec: Norm) -> Tensor:
    """The norm over the last dimension of x, computed in at least float32, in x's dtype.

    Semantics:
        x = x - mean(x)                                   if centred (layer norm, arXiv:1607.06450)
        y = weight · x / sqrt(mean(x²) + eps)             (RMS norm, arXiv:1910.07467)
    """
    standard, _ = _standard(x, spec)
    return standard.mul_(spec.weight).to(x.dtype)


@natively(_native_norm_backward)
def norm_backward(dy: Tensor, x: Tensor, spec: Norm, more: Tensor | None = None) -> Tensor:
    """The gradient of x plus `more`, in x's dtype. Computing the statistics again is cheaper than keeping them."""
    standard, factor = _standard(x, spec)
    dx = dy.to(factor.dtype) * spec.weight
    along = torch.linalg.vecdot(dx, standard)[..., None] / x.shape[-1]
    if spec.centred:
        dx -= dx.mean(-1, keepdim=True)
    dx = dx.addcmul_(standard, along, value=-1).mul_(factor).to(x.dtype)
    return dx if more is None else dx.add_(more)


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
