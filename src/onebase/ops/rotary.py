"""Rotary position embedding: pairs of a head's channels turned by an angle that grows with the position."""

from __future__ import annotations

from math import prod
from typing import NamedTuple

from torch import Tensor

from onebase.ops import kernels
from onebase.ops.kernels import natively


class Rotation(NamedTuple):
    """The angles of T positions: cos and sin (T, n). Of a head's channels the first 2n are turned.

    A pair is (i, i + n), or (2i, 2i + 1) where `interleaved` (Cohere).
    """

    cos: Tensor
    sin: Tensor
    interleaved: bool = False

    @property
    def inverse(self) -> Rotation:
        """The same angles backwards: as a rotation is orthogonal, this turns gradients too."""
        return self._replace(sin=-self.sin)


def _native_rotate(x: Tensor, rotation: Rotation) -> Tensor:
    if not kernels.by_row(x) or not all(t.is_contiguous() and t.dtype == x.dtype for t in rotation[:2]):
        return NotImplemented
    cos, sin = (t.data_ptr() for t in rotation[:2])
    pairs, heads = rotation.cos.shape[-1], prod(x.shape[1:-1])
    spec = kernels.Rotation(cos, sin, pairs, heads, x.shape[-1], rotation.interleaved)
    kernels.call("rotate", x, kernels.rows(x), spec, x.shape[0])
    return x


@natively(_native_rotate)
def rotate_(x: Tensor, rotation: Rotation) -> Tensor:
    """Turn x (T, ..., d), of any strides, in its own memory.

    Semantics, for the pair (a, b) of channels with the angle θ:
        x(a), x(b) = x(a)·cos θ - x(b)·sin θ, x(b)·cos θ + x(a)·sin θ
    Source: Su et al. 2021, "RoFormer: Enhanced Transformer with Rotary Position Embedding", equation 34.
    """
    shape = (x.shape[0], *(1,) * (x.ndim - 2), -1)
    cos, sin = (angles.view(shape) for angles in rotation[:2])
    turned = 2 * cos.shape[-1]
    first, second = _pairs(x[..., :turned], rotation.interleaved)
    before = first.clone()
    first.mul_(cos).addcmul_(second, sin, value=-1)
    second.mul_(cos).addcmul_(before, sin)
    return x


def _pairs(x: Tensor, interleaved: bool) -> tuple[Tensor, Tensor]:
    if interleaved:
        return x[..., ::2], x[..., 1::2]
    first, second = x.chunk(2, dim=-1)
    return first, second
