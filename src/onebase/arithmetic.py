"""Adapters -> Adapter: weighted sums, TIES, DARE, pruning, negation and compression. Needs no base model.

All is computed in float64 and cast once to the factors' dtype. A result's scale is 1: alpha = rank, everywhere.
"""

from __future__ import annotations

import hashlib
import math
import re
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from itertools import combinations
from typing import Any, NamedTuple

import torch
from torch import Tensor

from onebase.adapter import Adapter, LowRank, Origin
from onebase.config import LoraConfig, Recipe
from onebase.errors import BaseMismatch, ConfigError
from onebase.options import require

# Shape suffixes: i = in features, o = out features, r = rank, n = adapters, * = any sizes.


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
    kept = torch.zeros(tensor.numel(), dtype=torch.bool)
    kept[tensor.abs().flatten().topk(count).indices] = True
    return tensor * kept.view_as(tensor)


def _random(tensor: Tensor, recipe: Recipe, name: str) -> Tensor:
    """Each value with probability `density`, divided by it, so that the expectation stays (DARE)."""
    digest = hashlib.sha256(f"{recipe.seed}:{name}".encode()).digest()
    generator = torch.Generator().manual_seed(int.from_bytes(digest[:8], "little") >> 1)
    kept = torch.rand(tensor.shape, generator=generator, dtype=torch.float64) < recipe.density
    return tensor * kept / recipe.density


def _total(tensors: Sequence[Tensor], weights: Sequence[float], recipe: Recipe | None = None) -> Tensor:
    return torch.stack([weight * tensor for tensor, weight in zip(tensors, weights, strict=True)]).sum(0)


def _elected(tensors: Sequence[Tensor], weights: Sequence[float], recipe: Recipe) -> Tensor:
    """The mean of w·t over the adapters whose value has the elected sign (TIES); the weights have no vote.

    Semantics, t (n, *):
        sign(*) = +1 where sum_n t(n, *) >= 0, else -1        (frequency: the sum of sgn t)
        out(*) = sum_n w(n) · t(n, *) · [sgn t(n, *) = sign(*)] / max(1, count_n [sgn t(n, *) = sign(*)])
    """
    stack = torch.stack(list(tensors))
    votes = (stack if recipe.sign == "total" else stack.sign()).sum(0)
    majority = torch.where(votes >= 0, 1.0, -1.0)
    agree = stack.sign() == majority
    return _total(list(stack * agree), weights) / agree.sum(0).clamp(min=1)


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
        full = [part.low.scale * (part.low.B.double() @ part.low.A.double()) for part in parts]
        thinned = [thin(update, recipe, part.name) for update, part in zip(full, parts, strict=True)]
        merged = merge(thinned, [part.weight for part in parts], recipe)
        u, s, vh = torch.linalg.svd(merged, full_matrices=False)
        return vh[: recipe.rank], u[:, : recipe.rank] * s[: recipe.rank]

    return run


def _cat(parts: Sequence[Part], recipe: Recipe) -> Factors:
    """The exact weighted sum: the factors side by side, each A times w·s; the ranks add up."""
    return (
        torch.cat([part.strength * part.low.A.double() for part in parts], dim=0),
        torch.cat([part.low.B.double() for part in parts], dim=1),
    )


def _svd(parts: Sequence[Part], recipe: Recipe) -> Factors:
    """The best fit of rank `recipe.rank` to the weighted sum (Eckart and Young 1936), from the factors alone.

    With B = Q_b·R_b and A^T = Q_a·R_a, the sum's singular values are those of the small R_b·R_a^T.
    """
    a, b = _cat(parts, recipe)
    q_b, r_b = torch.linalg.qr(b)
    q_a, r_a = torch.linalg.qr(a.T)
    u, s, vh = torch.linalg.svd(r_b @ r_a.T)
    return vh[: recipe.rank] @ q_a.T, q_b @ u[:, : recipe.rank] * s[: recipe.rank]


# Sources: linear, cat, svd: PEFT's add_weighted_adapter; ties: Yadav et al. 2023; dare: Yu et al. 2023.
METHODS: dict[str, Method] = {
    "cat": Method(_cat, sums=True),
    "svd": Method(_svd, ("rank",), sums=True),
    "linear": Method(_on_factors(_everything, _total), same_rank=True, sums=True),
    "ties": Method(_on_factors(_largest, _elected), ("density", "sign"), same_rank=True),
    "dare_linear": Method(_on_factors(_random, _total), ("density", "seed"), same_rank=True),
    "dare_ties": Method(_on_factors(_random, _elected), ("density", "sign", "seed"), same_rank=True),
    "magnitude_prune": Method(_on_factors(_largest, _total), ("density",), same_rank=True),
    "ties_svd": Method(_on_updates(_largest, _elected), ("rank", "density", "sign")),
    "dare_linear_svd": Method(_on_updates(_random, _total), ("rank", "density", "seed")),
    "dare_ties_svd": Method(_on_updates(_random, _elected), ("rank", "density", "sign", "seed")),
    "magnitude_prune_svd": Method(_on_updates(_largest, _total), ("rank", "density")),
}


def combine(
    adapters: Sequence[Adapter], weights: Sequence[float], recipe: Recipe, allow_base_mismatch: bool = False
) -> Adapter:
    """One adapter made of several, a weight for each; a weight below 0 takes an adapter's effect away.

    A module that only some adapters change is combined from those. A module trained in full is averaged, where
    the weights of its adapters sum to 1 (nothing else is exact without the base) and the method only sums.
    Random draws depend on the seed, the module's path and the adapter's place alone.

    Raises ConfigError for options, weights, ranks or prompt formats that do not go together, BaseMismatch where
    the adapters are for different bases; `allow_base_mismatch` lets other names and fingerprints pass, never
    other shapes.
    """
    _check_call(adapters, weights, recipe)
    _check_origins(adapters, allow_base_mismatch)
    parts = _parts(adapters, weights)
    _check_parts(parts, adapters, recipe)
    recipe = _ranked(parts, recipe)
    low = {path: _combined(path, here, recipe) for path, here in parts.items()}
    full = _averages(adapters, weights, recipe)
    return Adapter(_config(adapters, low), low, full, _origin(adapters, weights, recipe))


def negate(adapter: Adapter) -> Adapter:
    """The adapter whose update is the opposite, to make a base forget a task (Ilharco et al. 2023).

    Exact: only the sign of B turns, and `negate(negate(a)) == a`. Raises ConfigError where modules are trained in
    full, whose opposite cannot be told without the base.
    """
    if adapter.full:
        raise ConfigError("negate modules that were trained in full", _some(adapter.full))
    low = {path: update._replace(B=-update.B) for path, update in adapter.lowrank.items()}
    training = dict(adapter.origin.training)
    if not training.pop("negated", False):
        training["negated"] = True
    return replace(adapter, lowrank=low, origin=replace(adapter.origin, training=training))


def compress(adapter: Adapter, rank: int) -> tuple[Adapter, dict[str, float]]:
    """The best adapter of rank at most `rank`, and each module's relative error in the Frobenius norm.

    Raises ConfigError for a rank below 1 or above every module's.
    """
    require("rank", rank, rank >= 1, "at least 1")
    small = combine([adapter], [1.0], Recipe(method="svd", rank=rank))
    return small, deviations(small, [adapter], [1.0])


def norms(adapter: Adapter) -> dict[str, float]:
    """The Frobenius norm of each module's update, from the factors alone."""
    return {path: _norm([Part(low, 1.0, path)]) for path, low in adapter.lowrank.items()}


def deviations(result: Adapter, adapters: Sequence[Adapter], weights: Sequence[float]) -> dict[str, float]:
    """How far each update is from the weighted sum of the adapters': |result - sum| / |sum|, Frobenius norms.

    Where the adapters cancel, |sum| counts as at least what rounding leaves of them in float32.
    """
    found: dict[str, float] = {}
    for path, parts in _parts(adapters, weights).items():
        rest = [*parts, Part(result.lowrank[path], -1.0, path)]
        least = torch.finfo(torch.float32).eps * sum(_norm([part]) for part in parts)
        found[path] = _norm(rest) / (max(_norm(parts), least) or 1.0)
    return found


def _norm(parts: Sequence[Part]) -> float:
    """The Frobenius norm of the sum of the parts' updates."""
    a, b = _cat(parts, Recipe())
    return float(torch.linalg.norm(torch.linalg.qr(b, mode="r").R @ torch.linalg.qr(a.T, mode="r").R.T))


def _parts(adapters: Sequence[Adapter], weights: Sequence[float]) -> dict[str, list[Part]]:
    """Module path -> the share of each adapter that changes it."""
    parts: dict[str, list[Part]] = {}
    for index, (adapter, weight) in enumerate(zip(adapters, weights, strict=True)):
        for path, low in adapter.lowrank.items():
            parts.setdefault(path, []).append(Part(low, weight, f"{index}:{path}"))
    return parts


def _combined(path: str, parts: Sequence[Part], recipe: Recipe) -> LowRank:
    first = parts[0].low
    try:
        a, b = (factor.to(first.A.dtype) for factor in METHODS[recipe.method].run(parts, recipe))
    except torch.linalg.LinAlgError:  # pyright: ignore[reportPrivateImportUsage]  # the SVD met NaN or infinity
        a = b = torch.tensor(math.nan)
    if not (a.isfinite().all() and b.isfinite().all()):
        hint = "choose smaller weights, or look for NaN in the adapters"
        raise ConfigError(f"combine {path}", "the result is not finite", hint=hint)
    return LowRank(a, b, 1.0, first.kind)


def _averages(
    adapters: Sequence[Adapter], weights: Sequence[float], recipe: Recipe
) -> dict[str, dict[str, Tensor]]:
    """Modules trained in full: sum of w·W, which is W0 + sum of w·(W - W0) where the weights sum to 1."""
    owners: dict[str, list[tuple[float, Mapping[str, Tensor]]]] = {}
    for adapter, weight in zip(adapters, weights, strict=True):
        for path, state in adapter.full.items():
            owners.setdefault(path, []).append((weight, state))
    for path, shares in owners.items():
        total, asked = math.fsum(weight for weight, _ in shares), f"combine {path}, trained in full"
        if not math.isclose(total, 1.0, rel_tol=1e-9):
            found = f"the weights of its adapters sum to {total:g}, which needs the base"
            raise ConfigError(asked, found, hint="let these weights sum to 1")
        if len(shares) > 1 and not METHODS[recipe.method].sums:
            found = f"{recipe.method} cannot prune it without the base"
            raise ConfigError(asked, found, [name for name, row in METHODS.items() if row.sums])
    return {
        path: {
            name: _total([state[name].double() for _, state in shares], [w for w, _ in shares]).to(
                tensor.dtype
            )
            for name, tensor in shares[0][1].items()
        }
        for path, shares in owners.items()
    }


def _check_call(adapters: Sequence[Adapter], weights: Sequence[float], recipe: Recipe) -> None:
    if not adapters:
        raise ConfigError("combine", "no adapters", hint="name at least one")
    if len(weights) != len(adapters):
        raise ConfigError("option weights", f"{len(weights)} weights for {len(adapters)} adapters")
    if not all(math.isfinite(weight) for weight in weights):
        raise ConfigError(f"option weights={','.join(map(str, weights))}", "must be finite numbers")
    for name in {"rank", "density", "sign", "seed"} - set(METHODS[recipe.method].reads):
        if getattr(recipe, name) != getattr(Recipe(), name):
            readers = [method for method, row in METHODS.items() if name in row.reads]
            found = f"method {recipe.method} does not use it"
            raise ConfigError(f"option {name}={getattr(recipe, name)}", found, readers)


def _check_origins(adapters: Sequence[Adapter], allow_base_mismatch: bool) -> None:
    """What is recorded must agree; what an adapter does not record can agree with anything."""
    origins = [adapter.origin for adapter in adapters]
    if not allow_base_mismatch and any(_differ(a, b) for a, b in combinations(origins, 2)):
        found = _some([f"{o.base or '(no name)'}, fingerprint {o.fingerprint or 'none'}" for o in origins])
        hint = "--allow-base-mismatch if you know that they are the same"
        raise BaseMismatch("the adapters are for different bases", found, hint=hint)
    prompts = [dict(origin.prompt) for origin in origins if origin.prompt]
    if any(prompt != prompts[0] for prompt in prompts):
        hint = "say whose the result is to be used with: --prompt-from FOLDER, or replace origin.prompt"
        raise ConfigError("adapters of different prompt formats", _some([str(p) for p in prompts]), hint=hint)
    tasks = {origin.task for origin in origins if origin.task}
    if len(tasks) > 1:
        raise ConfigError("the adapters are for different tasks", ", ".join(sorted(tasks)))


def _differ(a: Origin, b: Origin) -> bool:
    """Fingerprints decide where both have one, else names where both have one."""
    for mine, theirs in ((a.fingerprint, b.fingerprint), (a.base, b.base)):
        if mine and theirs:
            return mine != theirs
    return False


def _check_parts(parts: Mapping[str, Sequence[Part]], adapters: Sequence[Adapter], recipe: Recipe) -> None:
    """The updates of a module must have one shape and kind; some methods want one rank too."""
    forms: dict[str, set[Any]] = {
        path: {(p.low.B.shape[0], p.low.A.shape[1], p.low.kind) for p in here} for path, here in parts.items()
    }
    problems: list[str] = []
    for adapter in adapters:
        for path, state in adapter.full.items():
            form = tuple(sorted((name, tuple(tensor.shape)) for name, tensor in state.items()))
            forms.setdefault(path, set()).add(form)
            inside = [p for p in parts if f"{p}.".startswith(f"{path}.")]
            problems += [f"{p}: one adapter updates it, another trains {path} in full" for p in inside]
    problems += [f"{path}: {' and '.join(map(str, f))}" for path, f in forms.items() if len(f) > 1]
    if problems:
        raise BaseMismatch("the adapters do not fit one another", _some(problems))
    ranks = {path: [part.low.rank for part in here] for path, here in parts.items()}
    uneven = [f"{path}: ranks {', '.join(map(str, r))}" for path, r in ranks.items() if len(set(r)) > 1]
    if METHODS[recipe.method].same_rank and uneven:
        able = [name for name, row in METHODS.items() if not row.same_rank]
        raise ConfigError(f"method {recipe.method} needs equal ranks", _some(uneven), able)


def _some(problems: Sequence[str] | Mapping[str, Any], count: int = 8) -> str:
    shown, more = list(problems)[:count], len(problems) - count
    return "\n  " + "\n  ".join([*shown, *([f"... and {more} more"] if more > 0 else [])])


def _ranked(parts: Mapping[str, Sequence[Part]], recipe: Recipe) -> Recipe:
    """The recipe with a rank, by default the largest that goes in; a module that cannot have it gets its largest."""
    if "rank" not in METHODS[recipe.method].reads:
        return recipe
    if not recipe.rank:
        return replace(recipe, rank=max((p.low.rank for here in parts.values() for p in here), default=0))
    possible = max((_highest(here, METHODS[recipe.method].sums) for here in parts.values()), default=0)
    if recipe.rank > possible:
        found = f"no module's update can have a rank above {possible}"
        raise ConfigError(f"option rank={recipe.rank}", found)
    return recipe


def _highest(parts: Sequence[Part], sums: bool) -> int:
    """The highest rank that an update can have: the weight's, and for a plain sum the ranks' sum."""
    size = min(parts[0].low.B.shape[0], parts[0].low.A.shape[1])
    return min(size, sum(part.low.rank for part in parts)) if sums else size


def _config(adapters: Sequence[Adapter], low: Mapping[str, LowRank]) -> LoraConfig:
    ranks = {path: update.rank for path, update in low.items()}
    rank = Counter(ranks.values()).most_common(1)[0][0] if ranks else adapters[0].config.rank
    odd = {f"^{re.escape(path)}": own for path, own in ranks.items() if own != rank}  # ^: this path alone
    configs = [adapter.config for adapter in adapters]
    named = all(isinstance(c.target_modules, tuple) and not (c.exclude_modules or c.layers) for c in configs)
    return LoraConfig(
        rank=rank,
        alpha=rank,
        target_modules=sorted({n for c in configs for n in c.target_modules} if named else low),
        rank_pattern=odd,
        alpha_pattern={key: float(own) for key, own in odd.items()},
        modules_to_save=sorted({name for config in configs for name in config.modules_to_save}),
    )


def _origin(adapters: Sequence[Adapter], weights: Sequence[float], recipe: Recipe) -> Origin:
    """What the adapters agree on, and how they were combined; a fingerprint only where they share one."""
    origins = [adapter.origin for adapter in adapters]
    known = [origin for origin in origins if origin.fingerprint] or [o for o in origins if o.base] or origins
    return Origin(
        base=known[0].base,
        fingerprint=known[0].fingerprint if len({origin.fingerprint for origin in known}) == 1 else "",
        task=next((origin.task for origin in origins if origin.task), ""),
        prompt=next((origin.prompt for origin in origins if origin.prompt), {}),
        training={
            "combined": [dict(origin.training) for origin in origins],
            "weights": list(weights),
            "method": recipe.method,
            **{name: getattr(recipe, name) for name in METHODS[recipe.method].reads},
        },
    )
