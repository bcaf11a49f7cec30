"""Gated activations (SwiGLU, GeGLU): act(gate) · up, and both gradients."""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

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


class Gated(NamedTuple):
    """z = act(gate) · up, and act(gate), both (T, n)."""

    z: Tensor
    active: Tensor


def gated(x: Halves, activation: str) -> Gated:
    """act(gate) · up.

    Source: Shazeer 2020, "GLU Variants Improve Transformer", section 2.
    """
    active = ACTIVATIONS[activation].value(x.gate)
    return Gated(active * x.up, active)


def gated_backward(dz: Tensor, done: Gated, x: Halves, activation: str, out: Halves) -> None:
    """Write the gradients of gate and up into `out`. The memory of dz is used for it."""
    torch.mul(dz, done.active, out=out.up)
    ACTIVATIONS[activation].gradient(dz.mul_(x.up), x.gate, out.gate)
