"""Gated activations (SwiGLU, GeGLU): act(gate) · up, and both gradients."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from onebase.ops import kernels
from onebase.ops.kernels import natively

_aten = torch.ops.aten


class Activation(NamedTuple):
    """An activation, and its gradient from (that of its output, its input), written into a third tensor."""

    value: Callable[[Tensor], Tensor]
    gradient: Callable[[Tensor, Tensor, Tensor], Tensor]


ACTIVATIONS = {
    "silu": Activation(F.silu, lambda dy, x, dx: _aten.silu_backward.grad_input(dy, x, grad_input=dx)),
    "gelu": Activation(F.gelu, lambda dy, x, dx: _aten.gelu_backward.grad_input(dy, x, grad_input=dx)),
    "gelu_tanh": Activation(
        lambda x: F.gelu(x, approximate="tanh"),
        lambda dy, x, dx: _aten.gelu_backward.grad_input(dy, x, approximate="tanh", grad_input=dx),
    ),
}


class Halves(NamedTuple):
    """What a gated MLP multiplies, or the gradients of these: (T, n) each, of any strides."""

    gate: Tensor
    up: Tensor


def _native_gated(x: Halves, activation: str) -> Tensor:
    if activation not in kernels.GATES or not kernels.by_row(*x):
        return NotImplemented
    z = torch.empty(x.gate.shape, dtype=x.gate.dtype)
    sizes = (z.shape[-1], kernels.GATES[activation], z.shape[0])
    kernels.call("gate", z, *map(kernels.rows, (z, *x)), *sizes)
    return z


def _native_gated_backward(dz: Tensor, x: Halves, activation: str, out: Halves) -> Any:
    if activation not in kernels.GATES or not kernels.by_row(dz, *x, *out):
        return NotImplemented
    sizes = (dz.shape[-1], kernels.GATES[activation], dz.shape[0])
    kernels.call("gate_backward", dz, *map(kernels.rows, (*out, dz, *x)), *sizes)
    return None


@natively(_native_gated)
def gated(x: Halves, activation: str) -> Tensor:
    """act(gate) · up, (T, n).

    Source: Shazeer 2020, "GLU Variants Improve Transformer", section 2.
    """
    return ACTIVATIONS[activation].value(x.gate).mul_(x.up)


@natively(_native_gated_backward)
def gated_backward(dz: Tensor, x: Halves, activation: str, out: Halves) -> None:
    """Write the gradients of gate and up into `out`. The memory of dz is used for it."""
    torch.mul(dz, ACTIVATIONS[activation].value(x.gate), out=out.up)
    ACTIVATIONS[activation].gradient(dz.mul_(x.up), x.gate, out.gate)
