"""Linear layers on the tokens of many adapters at once: each adapter's factors wait in a slot of one buffer.

A step gathers nothing: rows in neighbouring slots are one batched product over a part of the buffer, rows of one
adapter one plain product with the factors of its slot.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from onebase.ops.lowrank import Factors


class Segment(NamedTuple):
    """Rows [start, stop) of a batch and the slot of their factors: one slot for all, or (`each`) one after another."""

    start: int
    stop: int
    slot: int
    each: bool = False


class Place(NamedTuple):
    """The factors of every slot for some layers with one input.

    A (slots, layers · rank, in): the layers' rows end to end. B: for each layer (slots, rank, out), the update's scale
    in it. Where an adapter has a smaller rank, or no update, there are zeros; in slots never filled, anything.
    """

    A: Tensor
    B: tuple[Tensor, ...]

    @property
    def rank(self) -> int:
        """The rows of A that each layer has."""
        return self.A.shape[1] // len(self.B)


def new_place(slots: int, rank: int, features: int, outs: Sequence[int], device: torch.device) -> Place:
    """Slots (float32) to be filled with updates up to this rank; until then they take no memory."""
    a = torch.empty(slots, rank * len(outs), features, device=device)
    return Place(a, tuple(torch.empty(slots, rank, out, device=device) for out in outs))


def fill(place: Place, slot: int, updates: Sequence[Factors | None]) -> None:
    """Put an adapter's updates of the layers (None: it has none there) into a slot."""
    for part, b, low in zip(
        place.A[slot].split(place.rank), (one[slot] for one in place.B), updates, strict=True
    ):
        rank = 0 if low is None else low.A.shape[0]
        if low is not None:
            part[:rank] = low.A
            torch.mul(low.B.T, low.scale, out=b[:rank])
        part[rank:] = 0
        b[rank:] = 0


def add_updates(x: Tensor, columns: Sequence[Tensor], place: Place, segments: Sequence[Segment]) -> None:
    """Add the segments' updates of x (T, in) to the layers' outputs `columns`, each (T, out), in place.

    Semantics, for each row t of a segment, its slot n and each layer:
        y(t) += (x(t) · A(n)ᵀ) · B(n)              in float32, the sum cast once to y's dtype
    """
    for start, stop, slot, each in segments:
        rows = x[start:stop].to(place.A.dtype)
        a = place.A[slot : slot + stop - start] if each else place.A[slot]
        h = torch.bmm(rows[:, None], a.mT) if each else rows @ a.mT
        for y, part, b in zip(columns, h.split(place.rank, dim=-1), place.B, strict=True):
            own = y[start:stop]
            if each:
                _add(own[:, None], part, b[slot : slot + stop - start])
            else:
                _add(own, part, b[slot])


def _add(y: Tensor, h: Tensor, b: Tensor) -> None:
    if y.dtype != h.dtype:
        y.copy_(y + h @ b)
    elif y.ndim == 2:
        y.addmm_(h, b)
    else:
        y.baddbmm_(h, b)


class Row(NamedTuple):
    """One sequence's part of a batch: how many rows, its slot, and what adapter it has (None: none)."""

    tokens: int
    slot: int
    adapter: object | None


def segments(rows: Sequence[Row]) -> list[Segment]:
    """How the rows of a batch, sequence after sequence, meet their adapters in the fewest products.

    Neighbours of one adapter are one plain product; single rows of neighbouring slots are one batched product.
    """
    found: list[Segment] = []
    adapters: list[object] = []
    start = 0
    for tokens, slot, adapter in rows:
        stop, last = start + tokens, found[-1] if found else None
        if adapter is None:
            pass
        elif last is None or last.stop != start:
            found.append(Segment(start, stop, slot))
            adapters.append(adapter)
        elif not last.each and adapters[-1] is adapter:
            found[-1] = last._replace(stop=stop)
        elif (
            tokens == 1
            and slot == last.slot + last.stop - last.start
            and (last.each or last.stop - last.start == 1)
        ):
            found[-1] = last._replace(stop=stop, each=True)
        else:
            found.append(Segment(start, stop, slot))
            adapters.append(adapter)
        start = stop
    return found
