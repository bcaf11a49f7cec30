"""Rotary position embedding: pairs of a head's channels turned by an angle that grows with the position."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor


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


def rotate(x: Tensor, rotation: Rotation | None, out: Tensor) -> Tensor:
    """Write x (T, ..., d), turned, into `out` of the same shape and any strides; None turns nothing.

    Semantics, for the pair (a, b) of channels with the angle θ:
        out(a) = x(a)·cos θ - x(b)·sin θ
        out(b) = x(b)·cos θ + x(a)·sin θ
    Source: Su et al. 2021, "RoFormer: Enhanced Transformer with Rotary Position Embedding", equation 34.
    """
    if rotation is None:
        return out.copy_(x)
    shape = (x.shape[0], *(1,) * (x.ndim - 2), -1)
    cos, sin = (angles.view(shape) for angles in rotation[:2])
    turned = 2 * cos.shape[-1]
    (first, second), (to_first, to_second) = (_pairs(t[..., :turned], rotation.interleaved) for t in (x, out))
    torch.mul(first, cos, out=to_first).addcmul_(second, sin, value=-1)
    torch.mul(second, cos, out=to_second).addcmul_(first, sin)
    if turned < x.shape[-1]:
        out[..., turned:] = x[..., turned:]
    return out


def _pairs(x: Tensor, interleaved: bool) -> tuple[Tensor, Tensor]:
    if interleaved:
        return x[..., ::2], x[..., 1::2]
    first, second = x.chunk(2, dim=-1)
    return first, second
