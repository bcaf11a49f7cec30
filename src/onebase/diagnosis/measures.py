"""Numbers about updates and about logits: sizes, spectra, angles, overlap, divergence. Pure functions of tensors.

All is computed in float64 from the factors, without forming B·A, but where it says otherwise.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from onebase.adapters.adapter import LowRank
from onebase.adapters.kinds import as_rows, merged_weight

# Shape suffixes: g = blocks, i = in features, o = out features, r = rank, k = directions, t = tokens, v = vocabulary.

INTRUDER_TOP, INTRUDER_COSINE = 10, 0.5  # PEFT's defaults in lora/intruders.py
NULL = 1e-9  # an update this small beside its factors is 0: what float64 leaves of two halves that cancel


class Directions(NamedTuple):
    """The singular value decomposition of s·B·A, of each block: left (g, o, k), values (g, k), right (g, i, k)."""

    left: Tensor
    values: Tensor
    right: Tensor


def directions(low: LowRank) -> Directions:
    """The singular vectors and values of s·B·A. The sign of s goes to the left vectors."""
    a, b = _factors(low)
    q_b, r_b = torch.linalg.qr(b)
    q_a, r_a = torch.linalg.qr(a.mT)
    u, values, vh = torch.linalg.svd(r_b @ r_a.mT, full_matrices=False)
    return Directions(q_b @ u * math.copysign(1.0, low.scale), values * abs(low.scale), q_a @ vh.mT)


def _factors(low: LowRank) -> tuple[Tensor, Tensor]:
    """A (g, r, i) and B (g, o, r)."""
    a, b = (tensor.double().unflatten(0, (low.blocks, -1)) for tensor in (low.A, low.B))
    return a, b


class Spectrum(NamedTuple):
    """How large an update is, and over how many directions it spreads."""

    norm: float  # Frobenius
    stable_rank: (
        float  # sum of the squared singular values over the largest one, mean over blocks; 0 for no update
    )
    top_share: float  # share of the squared norm in the first direction of each block


def spectrum(low: LowRank) -> Spectrum:
    """The spectrum of s·B·A; all 0 where the product is 0 up to float64's rounding of its factors."""
    squares = directions(low).values.square()
    total, bound = float(squares.sum()), abs(low.scale) * float(low.A.double().norm() * low.B.double().norm())
    if math.sqrt(total) <= NULL * bound:
        return Spectrum(0.0, 0.0, 0.0)
    first, each = squares[:, 0], squares.sum(1)
    return Spectrum(
        math.sqrt(total), float((each[first > 0] / first[first > 0]).mean()), float(first.sum()) / total
    )


def inner(one: LowRank, other: LowRank) -> float:
    """<s·B·A, s'·B'·A'>, the Frobenius inner product.

    Semantics:
        s·s' · sum_g sum_rr' (B^T·B')(r, r') · (A·A'^T)(r, r')
    """
    (a, b), (a2, b2) = _factors(one), _factors(other)
    return one.scale * other.scale * float(((b.mT @ b2) * (a @ a2.mT)).sum())


def cosine(one: LowRank, other: LowRank) -> float | None:
    """The cosine between two updates as vectors; None where one is 0."""
    sizes = spectrum(one).norm * spectrum(other).norm
    return max(-1.0, min(1.0, inner(one, other) / sizes)) if sizes else None


class Overlap(NamedTuple):
    """How much two updates share of what they read (rows of A) and write (columns of B): 0 orthogonal, 1 nested."""

    inputs: float
    outputs: float
    chance_inputs: float  # what random directions of these ranks would share
    chance_outputs: float


def overlap(one: LowRank, other: LowRank) -> Overlap | None:
    """phi = |U^T·U'|^2 / min(k, k') of the subspaces that the updates span, mean over blocks; None where one is 0.

    Source: Hu et al. 2021, section 7.2, equation 4, there with A's right singular vectors. Here the vectors are
    those of B·A, so that factors which mean the same update give the same answer.
    """
    if not (spectrum(one).norm and spectrum(other).norm):
        return None
    mine, theirs = directions(one), directions(other)
    pairs = zip(_kept(mine), _kept(theirs), strict=True)
    rows = [(*_phi(v, v2), *_phi(u, u2)) for (u, v), (u2, v2) in pairs if u.shape[1] and u2.shape[1]]
    if not rows:
        return None
    inputs, by_chance, outputs, out_by_chance = (
        sum(column) / len(rows) for column in zip(*rows, strict=True)
    )
    return Overlap(inputs, outputs, by_chance, out_by_chance)


def _kept(found: Directions) -> list[tuple[Tensor, Tensor]]:
    """Of each block the left and right vectors that stand for more than rounding."""
    return [
        (u[:, s > 1e-6 * s.max()], v[:, s > 1e-6 * s.max()])
        for u, s, v in zip(found.left, found.values, found.right, strict=True)
    ]


def _phi(one: Tensor, other: Tensor) -> tuple[float, float]:
    """The overlap of two orthonormal bases (n, k) and (n, k'), and its mean for random ones: k·k'/n / min(k, k')."""
    shared = float((one.T @ other).square().sum()) / min(one.shape[1], other.shape[1])
    return min(1.0, shared), max(one.shape[1], other.shape[1]) / one.shape[0]


def change(weight: Tensor, low: LowRank) -> Tensor:
    """W' - W as (g·o, i) float32, with DoRA's magnitude; forms the matrix."""
    rows = weight.float()
    return as_rows(merged_weight(rows, low), low) - as_rows(rows, low)


def intruders(weight: Tensor, low: LowRank) -> tuple[int, int]:
    """How many of the first left singular vectors of W' have no near counterpart in W, and of how many; first block.

    A vector is an intruder where its cosine with every singular vector of W is below 0.5, of the first 10.
    Source: Shuttleworth et al. 2024, "LoRA vs Full Fine-tuning: An Illusion of Equivalence". Two full SVDs.
    """
    before = as_rows(weight, low).unflatten(0, (low.blocks, -1))[0].float()
    after = before + change(weight, low).unflatten(0, (low.blocks, -1))[0]
    if not after.isfinite().all():  # it overflows float32: nothing of W is left
        return (top := min(INTRUDER_TOP, *after.shape)), top
    old = torch.linalg.svd(before, full_matrices=False).U
    new = torch.linalg.svd(after, full_matrices=False).U[:, :INTRUDER_TOP]
    return int(((old.T @ new).abs().amax(0) < INTRUDER_COSINE).sum()), new.shape[1]


class Share(NamedTuple):
    """What tells, for one update or summed over several, how much of it a weight holds already: see `held`."""

    along: float
    squares: float
    noise: float


def share(weight: Tensor, low: LowRank) -> Share:
    """How far W goes along each direction of s·B·A = sum_k s_k·u_k·v_k^T, weighted by s_k.

    u_k^T·W·v_k holds s_k more after a merge than before; the pairs u_k, v_l with k != l, which a merge leaves as
    they were, say how large these numbers are by themselves.
    """
    u, s, v = directions(low)
    inside = u.mT @ as_rows(weight, low).double().unflatten(0, (low.blocks, -1)) @ v
    across = inside - torch.diag_embed(inside.diagonal(dim1=1, dim2=2))
    others = s.shape[1] - 1
    noise = (s.square() * across.square().sum(2)).sum() / others if others else math.inf
    along = (s * inside.diagonal(dim1=1, dim2=2)).sum()
    return Share(float(along), float(s.square().sum()), float(noise))


def held(shares: Sequence[Share]) -> tuple[float, float]:
    """The multiple of the updates that lies in the weights (0 before a merge, 1 after), and its standard deviation."""
    along, squares, noise = (math.fsum(column) for column in zip(*shares, strict=True))
    return along / squares, math.sqrt(noise) / squares


class Effect(NamedTuple):
    """What separates two models on some text: divergences in nats a token, and how often their choice differs."""

    tokens: int
    mean: float
    largest: float
    changed: float  # share of the positions whose likeliest token is another


def divergence(p_tv: Tensor, q_tv: Tensor) -> Tensor:
    """KL(p || q) of each position, (t,), in float64, of two sets of logits; over the vocabulary that both have."""
    shared = min(p_tv.shape[1], q_tv.shape[1])
    p, q = (logits[:, :shared].double().log_softmax(1) for logits in (p_tv, q_tv))
    return torch.where(p > -math.inf, p.exp() * (p - q), 0.0).sum(1).clamp(min=0.0)
