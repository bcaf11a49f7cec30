"""Gated activations (SwiGLU, GeGLU): act(gate) · up, and both gradients."""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

_aten = torch.ops.aten


class Activation(NamedTuple):
    """An activation, and its gradient from (that of its output, its input)."""

    value: Callable[[Tensor], Tensor]
    gradient: Callable[[Tensor, Tensor], Tensor]


ACTIVATIONS = {
    "silu": Activation(F.silu, lambda dy, x: _aten.silu_backward(dy, x)),
    "gelu": Activation(F.gelu, lambda dy, x: _aten.gelu_backward(dy, x)),
    "gelu_tanh": Activation(
        lambda x: F.gelu(x, approximate="tanh"), lambda dy, x: _aten.gelu_backward(dy, x, approximate="tanh")
    ),
}


class Gated(NamedTuple):
    """z = act(gate) · up, and act(gate), both (T, n)."""

    z: Tensor
    active: Tensor


def gated(gate_up: Tensor, activation: str) -> Gated:
    """act(gate) · up for gate_up (T, 2n), whose first n columns are the gate.

    Source: Shazeer 2020, "GLU Variants Improve Transformer", section 2.
    """
    gate, up = gate_up.chunk(2, dim=-1)
    active = ACTIVATIONS[activation].value(gate)
    return Gated(active * up, active)


def gated_backward(dz: Tensor, done: Gated, gate_up: Tensor, activation: str) -> Tensor:
    """The gradient (T, 2n) of gate_up."""
    gate, up = gate_up.chunk(2, dim=-1)
    gradient = torch.empty_like(gate_up)
    d_gate, d_up = gradient.chunk(2, dim=-1)
    torch.mul(dz, done.active, out=d_up)
    d_gate.copy_(ACTIVATIONS[activation].gradient(dz * up, gate))
    return gradient
