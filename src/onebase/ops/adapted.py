"""Frozen linear layers with low-rank updates: several that share an input, and the gradients of input and factors.

The rows of one input may belong to several adapters: the frozen products run once over all of them, each adapter's on
its own.
"""

from __future__ import annotations

import ctypes
from collections.abc import Sequence
from typing import Generic, NamedTuple, TypeVar

import torch
from torch import Tensor

from onebase.ops import kernels
from onebase.ops.kernels import natively
from onebase.ops.lowrank import Factors
from onebase.ops.products import added_product, product

T = TypeVar("T")


class Linear(NamedTuple):
    """A frozen layer: weight (out, in), bias (out,)."""

    weight: Tensor
    bias: Tensor | None = None


class Dropout(NamedTuple):
    """Drops an update's inputs. The seed makes the mask again in the backward pass, so no mask is kept."""

    rate: float
    seed: int

    def mask(self, like: Tensor, number: int) -> Tensor:
        """0 or 1 / (1 - rate) for each element of `like`; another mask for each number."""
        generator = torch.Generator(like.device).manual_seed(self.seed + number)
        kept = torch.empty_like(like).bernoulli_(1 - self.rate, generator=generator)
        return kept.div_(1 - self.rate)


class Share(NamedTuple, Generic[T]):
    """An adapter's rows [start, stop) of an input, its update of each layer there (or what stands for it)."""

    start: int
    stop: int
    updates: Sequence[T | None]
    dropout: Dropout | None = None

    @property
    def present(self) -> list[T]:
        """The updates that there are."""
        return [low for low in self.updates if low is not None]

    def adapted(self, outputs: Sequence[Tensor]) -> list[Tensor]:
        """Of the layers' outputs those that have an update."""
        return [y for low, y in zip(self.updates, outputs, strict=True) if low is not None]


class Projected(NamedTuple):
    """Each layer's output (T, out), and each share's x·Aᵀ side by side (rows, sum of ranks), for the backward pass."""

    y: list[Tensor]
    h: list[Tensor]


def project(x: Tensor, layers: Sequence[Linear], shares: Sequence[Share[Factors]]) -> Projected:
    """All layers on one input x (T, in). Rows in no share get no update; no row is in two.

    Semantics, for each layer and, on each share's rows, its update:
        y = x·Wᵀ + bias + s·(drop(x)·Aᵀ)·Bᵀ          all in x's dtype, to which A and B are cast
    On a bfloat16 base this is what torch's autocast makes of float32 factors; the factors themselves stay as they are.
    The kernels (lowrank.c) read the float32 factors and keep h in float32: one rounding, that of y.
    """
    y = [product(x, layer.weight, layer.bias) for layer in layers]
    h = [
        _add_updates(x[own.start : own.stop], [part[own.start : own.stop] for part in y], own)
        for own in shares
    ]
    return Projected(y, h)


def _native_spec(
    x: Tensor, outputs: Sequence[Tensor], lows: Sequence[Factors], gradients: Sequence[Tensor] = ()
) -> ctypes.Array[kernels.Update] | None:
    """Updates of these outputs (or of their gradients) as the kernels take them; None where they do not."""
    factors = [tensor for low in lows for tensor in (low.A, low.B)]
    plain = all(t.dtype == torch.float32 and t.is_contiguous() for t in factors)
    if not lows or not plain or not kernels.by_row(x, *outputs):
        return None
    places = [t.data_ptr() for t in gradients] or [None] * len(factors)
    return (kernels.Update * len(lows))(
        *(
            (
                low.A.data_ptr(),
                low.B.data_ptr(),
                *into,
                kernels.rows(y),
                low.A.shape[0],
                y.shape[1],
                low.scale,
            )
            for low, y, into in zip(lows, outputs, zip(places[::2], places[1::2], strict=True), strict=True)
        )
    )


def _native_add_updates(x: Tensor, outputs: Sequence[Tensor], own: Share[Factors]) -> Tensor:
    spec = None if own.dropout else _native_spec(x, own.adapted(outputs), own.present)
    if spec is None:
        return NotImplemented
    h = torch.empty(x.shape[0], sum(_ranks(own.present)))
    kernels.call("update", x, spec, len(spec), kernels.rows(x), x.shape[1], h.data_ptr(), x.shape[0])
    return h


@natively(_native_add_updates)
def _add_updates(x: Tensor, outputs: Sequence[Tensor], own: Share[Factors]) -> Tensor:
    """Add a share's updates, of its rows x, to its rows of the layers' outputs; gives the x·Aᵀ side by side."""
    present = _cast(own.present, x.dtype)
    if not present:
        return x.new_empty(x.shape[0], 0)
    if own.dropout is None:
        h = product(x, _stack(present))
    else:
        dropped = (x * own.dropout.mask(x, number) for number in range(len(present)))
        h = torch.cat([product(part, low.A) for part, low in zip(dropped, present, strict=True)], dim=1)
    for low, part, own_h in zip(present, own.adapted(outputs), h.split(_ranks(present), dim=1), strict=True):
        part.addmm_(own_h, low.B.T, alpha=low.scale)
    return h


class Gradients(NamedTuple):
    """Of the input (None where not asked for), and of A and B of each update that a share has, share by share."""

    x: Tensor | None
    factors: list[Tensor]


def project_backward(
    dy: Sequence[Tensor],
    projected: tuple[Tensor, Sequence[Tensor]],
    layers: Sequence[Linear],
    shares: Sequence[Share[Factors]],
    wants_x: bool,
) -> Gradients:
    """The gradients for dy, (T, out) for each layer; `projected` = (x, h): the input, and `project`'s h."""
    x, h = projected
    dx = _input_gradient(dy, layers) if wants_x else None
    factors: list[Tensor] = []
    for own, h_own in zip(shares, h, strict=True):
        rows = slice(own.start, own.stop)
        parts = [part[rows] for part in dy]
        factors += _update_gradients(parts, (x[rows], h_own), None if dx is None else dx[rows], own)
    return Gradients(dx, factors)


def _native_update_gradients(
    dy: Sequence[Tensor], projected: tuple[Tensor, Tensor], dx: Tensor | None, share: Share[Factors]
) -> list[Tensor]:
    (x, h), lows = projected, share.present
    found = [torch.empty_like(tensor) for low in lows for tensor in (low.A, low.B)]
    spec = None if share.dropout else _native_spec(x, share.adapted(dy), lows, found)
    if spec is None:
        return NotImplemented
    dh = torch.empty_like(h)
    pointers = (x.shape[1], h.data_ptr(), dh.data_ptr())
    kernels.call(
        "update_backward", x, spec, len(spec), kernels.rows(x), kernels.rows(dx), *pointers, x.shape[0]
    )
    return found


@natively(_native_update_gradients)
def _update_gradients(
    dy: Sequence[Tensor], projected: tuple[Tensor, Tensor], dx: Tensor | None, share: Share[Factors]
) -> list[Tensor]:
    """The gradients of a share's factors, from its rows of all else; what flows to x through them is added to dx."""
    (x, h), dropout, lows = projected, share.dropout, _cast(share.present, projected[0].dtype)
    if not lows:
        return []
    adapted = share.adapted(dy)
    ranks = _ranks(lows)
    d_hs = [product(part, low.B.T).mul_(low.scale) for low, part in zip(lows, adapted, strict=True)]
    # hᵀ·dY and then the transpose: a tall result ran 2.7 times slower than this wide one.
    d_bs = [
        product(own.T, part.T).mul_(low.scale).T
        for low, part, own in zip(lows, adapted, h.split(ranks, dim=1), strict=True)
    ]
    if dropout is None:
        dh = d_hs[0] if len(d_hs) == 1 else torch.cat(d_hs, dim=1)
        d_as = list(product(dh.T, x.T).split(ranks))
        if dx is not None:
            dx.addmm_(dh, _stack(lows))
    else:
        d_as = list[Tensor]()
        for number, (low, d_own) in enumerate(zip(lows, d_hs, strict=True)):
            mask = dropout.mask(x, number)
            d_as.append(product(d_own.T, (x * mask).T))
            if dx is not None:
                dx += product(d_own, low.A.T).mul_(mask)
    pairs = zip(d_as, d_bs, share.present, strict=True)
    return [gradient.to(low.A.dtype) for *pair, low in pairs for gradient in pair]


def _cast(lows: Sequence[Factors], dtype: torch.dtype) -> list[Factors]:
    return [low._replace(A=low.A.to(dtype), B=low.B.to(dtype)) for low in lows]


def _ranks(lows: Sequence[Factors]) -> list[int]:
    return [low.A.shape[0] for low in lows]


def _stack(lows: Sequence[Factors]) -> Tensor:
    return lows[0].A if len(lows) == 1 else torch.cat([low.A for low in lows])


def _input_gradient(dy: Sequence[Tensor], layers: Sequence[Linear]) -> Tensor:
    dx = product(dy[0], layers[0].weight.T)
    for part, layer in zip(dy[1:], layers[1:], strict=True):
        dx = added_product(dx, part, layer.weight.T)
    return dx
