"""Frozen linear layers with low-rank updates: several that share an input, and the gradients of input and factors.

The rows of one input may belong to several adapters: the frozen products run once over all of them, each adapter's on
its own.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Generic, NamedTuple, TypeVar

import torch
from torch import Tensor

from onebase.ops.lowrank import Factors

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


class Projected(NamedTuple):
    """The layers' outputs side by side (T, sum of out), and each share's x·Aᵀ side by side (rows, sum of ranks)."""

    y: Tensor
    h: list[Tensor]


def project(x: Tensor, layers: Sequence[Linear], shares: Sequence[Share[Factors]]) -> Projected:
    """All layers on one input x (T, in). Rows in no share get no update; no row is in two.

    Semantics, for each layer and, on each share's rows, its update:
        y = x·Wᵀ + bias + s·(drop(x)·Aᵀ)·Bᵀ          the update in A's dtype, the sum cast once to x's
    """
    y = x.new_empty(x.shape[0], sum(layer.weight.shape[0] for layer in layers))
    columns = y.split([layer.weight.shape[0] for layer in layers], dim=1)
    for layer, part in zip(layers, columns, strict=True):
        if layer.bias is None:
            torch.mm(x, layer.weight.T, out=part)
        else:
            torch.addmm(layer.bias, x, layer.weight.T, out=part)
    h = [_add_updates(x[own.start : own.stop], columns, own) for own in shares]
    return Projected(y, h)


def _add_updates(x: Tensor, columns: Sequence[Tensor], own: Share[Factors]) -> Tensor:
    """Add a share's updates, of its rows x, to the layers' outputs; gives the x·Aᵀ side by side."""
    present = own.present
    if not present:
        return x.new_empty(x.shape[0], 0)
    wide = x.to(present[0].A.dtype)
    if own.dropout is None:
        h = wide @ _stack(present).T
    else:
        dropped = (wide * own.dropout.mask(wide, number) for number in range(len(present)))
        h = torch.cat([part @ low.A.T for part, low in zip(dropped, present, strict=True)], dim=1)
    parts = iter(h.split([low.A.shape[0] for low in present], dim=1))
    for low, part in zip(own.updates, columns, strict=True):
        if low is not None:
            _add_product(part[own.start : own.stop], next(parts), low.B.T, low.scale)
    return h


class Gradients(NamedTuple):
    """Of the input (None where not asked for), and of A and B of each update that a share has, share by share."""

    x: Tensor | None
    factors: list[Tensor]


def project_backward(
    dy: Tensor,
    projected: tuple[Tensor, Sequence[Tensor]],
    layers: Sequence[Linear],
    shares: Sequence[Share[Factors]],
    wants_x: bool,
) -> Gradients:
    """The gradients for dy (T, sum of out), from `projected` = (x, h): the input, and what `project` gave beside y."""
    x, h = projected
    columns = dy.split([layer.weight.shape[0] for layer in layers], dim=1)
    dx = _input_gradient(columns, layers) if wants_x else None
    factors: list[Tensor] = []
    for own, h_own in zip(shares, h, strict=True):
        rows = slice(own.start, own.stop)
        parts = [part[rows] for part in columns]
        factors += _update_gradients(parts, (x[rows], h_own), None if dx is None else dx[rows], own)
    return Gradients(dx, factors)


def _update_gradients(
    columns: Sequence[Tensor], projected: tuple[Tensor, Tensor], dx: Tensor | None, share: Share[Factors]
) -> list[Tensor]:
    """The gradients of a share's factors, from its rows of all else; what flows to x through them is added to dx."""
    (x, h), dropout, lows = projected, share.dropout, share.present
    if not lows:
        return []
    present = [(low, part) for low, part in zip(share.updates, columns, strict=True) if low is not None]
    ranks = [low.A.shape[0] for low in lows]
    dh, d_bs = torch.empty_like(h), list[Tensor]()
    for (low, part), own, d_own in zip(present, h.split(ranks, 1), dh.split(ranks, 1), strict=True):
        wide = part.to(h.dtype)
        torch.mm(wide, low.B, out=d_own).mul_(low.scale)
        # hᵀ·dY and then the transpose: a tall result ran 2.7 times slower than this wide one.
        d_bs.append((own.T @ wide).mul_(low.scale).T)
    wide = x.to(h.dtype)
    if dropout is None:
        d_as = list((dh.T @ wide).split(ranks))
        if dx is not None:
            _add_product(dx, dh, _stack(lows), 1.0)
    else:
        d_as = list[Tensor]()
        for number, (low, d_own) in enumerate(zip(lows, dh.split(ranks, 1), strict=True)):
            mask = dropout.mask(wide, number)
            d_as.append(d_own.T @ (wide * mask))
            if dx is not None:
                dx += (d_own @ low.A).mul_(mask)
    return [gradient for pair in zip(d_as, d_bs, strict=True) for gradient in pair]


def _stack(lows: Sequence[Factors]) -> Tensor:
    return lows[0].A if len(lows) == 1 else torch.cat([low.A for low in lows])


def _input_gradient(columns: Sequence[Tensor], layers: Sequence[Linear]) -> Tensor:
    dx = columns[0] @ layers[0].weight
    for part, layer in zip(columns[1:], layers[1:], strict=True):
        dx.addmm_(part, layer.weight)
    return dx


def _add_product(to: Tensor, one: Tensor, other: Tensor, scale: float) -> None:
    """Add scale · one·other in place, in the product's dtype where that is another."""
    if to.dtype == one.dtype:
        to.addmm_(one, other, alpha=scale)
    else:
        to.copy_(to + (one @ other).mul_(scale))
