"""How two adapters' updates differ, module by module: angle, shared subspaces, sizes. Needs a base for DoRA only."""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

from torch import Tensor

from onebase.adapters.adapter import Adapter, LowRank
from onebase.diagnosis.measures import Overlap, change, cosine, overlap, spectrum

Weights = Callable[[str], Tensor]
"""A module's path -> the base's weight there."""


class Pair(NamedTuple):
    """One module in both adapters; None where it cannot be told: in one of them alone, 0, or DoRA without a base."""

    path: str
    ranks: tuple[int, int]  # 0: the adapter does not change this module
    norms: tuple[float | None, float | None]  # |W' - W|
    cosine: float | None = None
    overlap: Overlap | None = None
    note: str = ""


def compare(one: Adapter, other: Adapter, weights: Weights | None = None) -> list[Pair]:
    """Every module that at least one of the adapters updates, in the first one's order.

    The cosine is that of the changes W' - W as vectors: from the factors, but for DoRA, whose change is no product
    of them and needs `weights`. Adapters of different ranks and targets can be compared.
    """
    paths = dict.fromkeys([*one.lowrank, *other.lowrank])
    return [_pair(path, one.lowrank.get(path), other.lowrank.get(path), weights) for path in paths]


def _pair(path: str, a: LowRank | None, b: LowRank | None, weights: Weights | None) -> Pair:
    ranks = (a.rank if a else 0, b.rank if b else 0)
    norms = (_norm(path, a, weights), _norm(path, b, weights))
    if a is None or b is None:
        return Pair(path, ranks, norms, note=f"only in the {'second' if a is None else 'first'}")
    if _form(a) != _form(b):
        return Pair(path, ranks, norms, note="the updates have different shapes: another base")
    return Pair(path, ranks, norms, _angle(path, a, b, weights), overlap(a, b))


def _form(low: LowRank) -> tuple[int, int, int, tuple[int, ...]]:
    return low.B.shape[0], low.A.shape[1], low.blocks, low.kernel


def _norm(path: str, low: LowRank | None, weights: Weights | None) -> float | None:
    if low is None:
        return 0.0
    if low.magnitude is None:
        return spectrum(low).norm
    return float(change(weights(path), low).norm()) if weights is not None else None


def _angle(path: str, a: LowRank, b: LowRank, weights: Weights | None) -> float | None:
    if a.magnitude is None and b.magnitude is None:
        return cosine(a, b)
    if weights is None:
        return None
    first, second = (change(weights(path), low).double() for low in (a, b))
    sizes = float(first.norm() * second.norm())
    return float((first * second).sum()) / sizes if sizes else None


class Summary(NamedTuple):
    """A comparison in four numbers."""

    shared: int  # modules that both update
    alone: tuple[int, int]
    cosine: float | None  # of all shared modules together, as one vector
    norms: tuple[float, float]  # of all modules that can be told


def summary(pairs: list[Pair]) -> Summary:
    """The two adapters as whole vectors; the cosine weighs each module by its size."""
    known = [p for p in pairs if p.cosine is not None]
    products = [(p.cosine or 0.0) * (p.norms[0] or 0.0) * (p.norms[1] or 0.0) for p in known]
    sizes = [sum((p.norms[n] or 0.0) ** 2 for p in known) ** 0.5 for n in (0, 1)]
    totals = [sum((p.norms[n] or 0.0) ** 2 for p in pairs) ** 0.5 for n in (0, 1)]
    whole = sum(products) / (sizes[0] * sizes[1]) if known and sizes[0] and sizes[1] else None
    alone = (sum(not p.ranks[1] for p in pairs), sum(not p.ranks[0] for p in pairs))
    return Summary(len(pairs) - sum(alone), alone, whole, (totals[0], totals[1]))
