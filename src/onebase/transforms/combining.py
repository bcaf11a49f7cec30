"""Ways to combine the low-rank updates of one module, as rows of a table: sums, TIES, DARE, pruning, best fits.

All is computed in float64. A module that holds several blocks (experts) is combined block by block.
"""

from __future__ import annotations

import hashlib
import math
from collections.abc import Callable, Sequence
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from onebase.adapters.adapter import LowRank
from onebase.config import Recipe
from onebase.errors import ConfigError

# Shape suffixes: i = in features, o = out features, r = rank, n = adapters, * = any sizes.

SMALL = 128  # sides up to this are decomposed in full; above, only as far as is asked
SPARE = 8  # vectors that the search carries beyond what it is asked for
TURNS = 40  # of the search, before it gives up: it needs about five
CLOSE = 1e-13  # of the largest eigenvalue: the error of each eigenvector that is accepted


class Part(NamedTuple):
    """One adapter's share in one module; `name` seeds its random draws."""

    low: LowRank
    weight: float
    name: str

    @property
    def strength(self) -> float:
        """What B·A is multiplied by: the adapter's weight times its own scale."""
        return self.weight * self.low.scale


Factors = tuple[Tensor, Tensor]  # A (r, i) and B (o, r), float64; the update is B·A
Thin = Callable[[Tensor, Recipe, str], Tensor]
Merge = Callable[[Sequence[Tensor], Sequence[float], Recipe], Tensor]


class Method(NamedTuple):
    """One way to combine the updates of a module."""

    run: Callable[[Sequence[Part], Recipe], Factors]
    reads: tuple[str, ...] = ()  # the options it uses; any other must be left at its default
    same_rank: bool = False  # adapters that share a module must have one rank there
    sums: bool = False  # a weighted sum without pruning: modules trained in full can follow


def _everything(tensor: Tensor, recipe: Recipe, name: str) -> Tensor:
    return tensor


def _largest(tensor: Tensor, recipe: Recipe, name: str) -> Tensor:
    """The share `density` of values that is largest in magnitude, 0 elsewhere (the trim of TIES)."""
    count = int(recipe.density * tensor.numel())
    if not count:
        found = f"keeps none of the {tensor.numel()} values of {name.partition(':')[2]}"
        raise ConfigError(f"option density={recipe.density}", found, hint="choose a larger density")
    sizes = tensor.abs().flatten()
    least = float(
        np.partition(sizes.numpy(), len(sizes) - count)[len(sizes) - count]
    )  # 20 times as fast as topk
    kept = sizes > least
    kept[(sizes == least).nonzero()[: count - int(kept.sum()), 0]] = True
    return tensor * kept.view_as(tensor)


def _random(tensor: Tensor, recipe: Recipe, name: str) -> Tensor:
    """Each value with probability `density`, divided by it, so that the expectation stays (DARE)."""
    digest = hashlib.sha256(f"{recipe.seed}:{name}".encode()).digest()
    generator = torch.Generator().manual_seed(int.from_bytes(digest[:8], "little") >> 1)
    kept = torch.rand(tensor.shape, generator=generator, dtype=torch.float64) < recipe.density
    return tensor * kept / recipe.density


def weighted_sum(tensors: Sequence[Tensor], weights: Sequence[float], recipe: Recipe | None = None) -> Tensor:
    """The weighted sum."""
    return sum((tensor * weight for tensor, weight in zip(tensors, weights, strict=True)), torch.zeros(()))


def _elected(tensors: Sequence[Tensor], weights: Sequence[float], recipe: Recipe) -> Tensor:
    """The mean of w·t over the adapters whose value has the elected sign (TIES); the weights have no vote.

    Semantics, t (n, *):
        sign(*) = +1 where sum_n t(n, *) >= 0, else -1        (frequency: the sum of sgn t)
        out(*) = sum_n w(n) · t(n, *) · [sgn t(n, *) = sign(*)] / max(1, count_n [sgn t(n, *) = sign(*)])
    """
    shape, kind = tensors[0].shape, tensors[0].dtype
    votes, voters, elected = (torch.zeros(shape, dtype=kind) for _ in range(3))
    for tensor in tensors:
        votes += tensor if recipe.sign == "total" else tensor.sign()
    positive = votes >= 0
    for tensor, weight in zip(tensors, weights, strict=True):
        agrees = torch.where(positive, tensor > 0, tensor < 0)
        elected += weight * tensor * agrees
        voters += agrees
    return elected / voters.clamp_(min=1)


def _on_factors(thin: Thin, merge: Merge) -> Callable[[Sequence[Part], Recipe], Factors]:
    """Combine the As and the Bs apart, as PEFT does.

    Each factor is weighted by sqrt|w·s|, A also by the sign of w·s. B·A of the result holds the cross terms
    B_n·A_m, so it is not the weighted sum of the updates, unless there is one adapter alone.
    """

    def run(parts: Sequence[Part], recipe: Recipe) -> Factors:
        roots = [math.sqrt(abs(part.strength)) for part in parts]
        signed = [math.copysign(root, part.strength) for root, part in zip(roots, parts, strict=True)]
        a = [thin(part.low.A.double(), recipe, f"{part.name}.A") for part in parts]
        b = [thin(part.low.B.double(), recipe, f"{part.name}.B") for part in parts]
        return merge(a, signed, recipe), merge(b, roots, recipe)

    return run


def _on_updates(thin: Thin, merge: Merge) -> Callable[[Sequence[Part], Recipe], Factors]:
    """Combine the full updates s·B·A, (o, i) each, and keep the best fit of rank `recipe.rank`."""

    def run(parts: Sequence[Part], recipe: Recipe) -> Factors:
        if merge is weighted_sum and recipe.density == 1:  # nothing is dropped: the factors alone will do
            return _svd(parts, recipe)
        thinned = [  # one full update at a time, until it is thinned
            thin(part.low.scale * (part.low.B.double() @ part.low.A.double()), recipe, part.name)
            for part in parts
        ]
        merged = merge(thinned, [part.weight for part in parts], recipe)
        return best_fit(merged, recipe.rank, sum(part.low.rank for part in parts))

    return run


def best_fit(matrix_oi: Tensor, rank: int, steps: int = 0) -> Factors:
    """The best fit of this rank to a matrix (Eckart and Young 1936), as A and B; one of them is orthonormal.

    V of the largest eigenvalues of M^T·M gives A = V^T and B = M·V; a wide M is turned over first. `steps` says after
    how many singular values a drop is likely: a sum of pruned updates is their low rank and noise, and the search
    for V is fast where it looks a little beyond that.
    """
    if matrix_oi.shape[0] < matrix_oi.shape[1]:
        a, b = best_fit(matrix_oi.T, rank, steps)
        return b.T, a.T
    vectors = _top_eigenvectors(matrix_oi.T @ matrix_oi, rank, steps)
    return vectors.T, matrix_oi @ vectors


def _top_eigenvectors(gram: Tensor, count: int, steps: int) -> Tensor:
    """The eigenvectors of the largest eigenvalues of a symmetric matrix, as columns, the largest first.

    Subspace iteration (Halko, Martinsson and Tropp 2011, section 4.5) that ends only when each vector's residual
    is within CLOSE; the full decomposition where it does not get there, or would not be slower.
    """
    width = max(count, steps) + SPARE
    if len(gram) > max(SMALL, 4 * width):
        start = torch.randn(len(gram), width, generator=torch.Generator().manual_seed(0), dtype=gram.dtype)
        basis = torch.linalg.qr(start).Q
        for _ in range(TURNS):
            image = gram @ basis
            values, turned = (part[..., -count:] for part in torch.linalg.eigh(basis.T @ image))
            if torch.linalg.norm(image @ turned - basis @ turned * values) <= CLOSE * values[-1]:
                return (basis @ turned).flip(1)
            basis = torch.linalg.qr(image).Q
    return torch.linalg.eigh(gram).eigenvectors[:, -count:].flip(1)


def cat(parts: Sequence[Part], recipe: Recipe) -> Factors:
    """The exact weighted sum: the factors side by side, each A times w·s; the ranks add up."""
    return (
        torch.cat([part.strength * part.low.A.double() for part in parts], dim=0),
        torch.cat([part.low.B.double() for part in parts], dim=1),
    )


def _svd(parts: Sequence[Part], recipe: Recipe) -> Factors:
    """The best fit of rank `recipe.rank` to the weighted sum (Eckart and Young 1936), from the factors alone.

    With B = Q_b·R_b and A^T = Q_a·R_a, the sum's singular values are those of the small R_b·R_a^T.
    """
    a, b = cat(parts, recipe)
    q_b, r_b = torch.linalg.qr(b)
    q_a, r_a = torch.linalg.qr(a.T)
    u, s, vh = torch.linalg.svd(r_b @ r_a.T)
    return vh[: recipe.rank] @ q_a.T, q_b @ u[:, : recipe.rank] * s[: recipe.rank]


# Sources: linear, cat, svd: PEFT's add_weighted_adapter; ties: Yadav et al. 2023; dare: Yu et al. 2023.
METHODS: dict[str, Method] = {
    "cat": Method(cat, sums=True),
    "svd": Method(_svd, ("rank",), sums=True),
    "linear": Method(_on_factors(_everything, weighted_sum), same_rank=True, sums=True),
    "ties": Method(_on_factors(_largest, _elected), ("density", "sign"), same_rank=True),
    "dare_linear": Method(_on_factors(_random, weighted_sum), ("density", "seed"), same_rank=True),
    "dare_ties": Method(_on_factors(_random, _elected), ("density", "sign", "seed"), same_rank=True),
    "magnitude_prune": Method(_on_factors(_largest, weighted_sum), ("density",), same_rank=True),
    "ties_svd": Method(_on_updates(_largest, _elected), ("rank", "density", "sign")),
    "dare_linear_svd": Method(_on_updates(_random, weighted_sum), ("rank", "density", "seed")),
    "dare_ties_svd": Method(_on_updates(_random, _elected), ("rank", "density", "sign", "seed")),
    "magnitude_prune_svd": Method(_on_updates(_largest, weighted_sum), ("rank", "density")),
}
