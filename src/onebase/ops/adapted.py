"""Frozen linear layers with low-rank updates: several that share an input, and the gradients of input and factors."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from onebase.ops.lowrank import Factors


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


class Projected(NamedTuple):
    """The layers' outputs side by side (T, sum of out), and the updates' x·Aᵀ side by side (T, sum of ranks)."""

    y: Tensor
    h: Tensor


def project(
    x: Tensor, layers: Sequence[Linear], updates: Sequence[Factors | None], dropout: Dropout | None
) -> Projected:
    """All layers on one input x (T, in).

    Semantics, for each layer and its update:
        y = x·Wᵀ + bias + s·(drop(x)·Aᵀ)·Bᵀ          the update in A's dtype, the sum cast once to x's
    """
    y = x.new_empty(x.shape[0], sum(layer.weight.shape[0] for layer in layers))
    columns = y.split([layer.weight.shape[0] for layer in layers], dim=1)
    for layer, part in zip(layers, columns, strict=True):
        if layer.bias is None:
            torch.mm(x, layer.weight.T, out=part)
        else:
            torch.addmm(layer.bias, x, layer.weight.T, out=part)
    present = [low for low in updates if low is not None]
    if not present:
        return Projected(y, x.new_empty(x.shape[0], 0))
    wide = x.to(present[0].A.dtype)
    if dropout is None:
        h = wide @ _stack(present).T
    else:
        dropped = (wide * dropout.mask(wide, number) for number in range(len(present)))
        h = torch.cat([part @ low.A.T for part, low in zip(dropped, present, strict=True)], dim=1)
    parts = iter(h.split([low.A.shape[0] for low in present], dim=1))
    for low, part in zip(updates, columns, strict=True):
        if low is not None:
            _add_product(part, next(parts), low.B.T, low.scale)
    return Projected(y, h)


class Gradients(NamedTuple):
    """Of the input (None where not asked for), and of A and B of each update that there is, in turn."""

    x: Tensor | None
    factors: list[Tensor]


def project_backward(
    dy: Tensor,
    projected: tuple[Tensor, Tensor],
    layers: Sequence[Linear],
    updates: Sequence[Factors | None],
    dropout: Dropout | None,
    wants_x: bool,
) -> Gradients:
    """The gradients for dy (T, sum of out), from `projected` = (x, h): the input, and what `project` gave beside y."""
    x, h = projected
    columns = dy.split([layer.weight.shape[0] for layer in layers], dim=1)
    dx = _input_gradient(columns, layers) if wants_x else None
    present = [(low, part) for low, part in zip(updates, columns, strict=True) if low is not None]
    if not present:
        return Gradients(dx, [])
    lows = [low for low, _ in present]
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
    return Gradients(dx, [gradient for pair in zip(d_as, d_bs, strict=True) for gradient in pair])


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
