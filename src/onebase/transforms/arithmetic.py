"""Adapters -> Adapter: weighted sums, TIES, DARE, pruning, negation and compression. Needs no base model.

All is computed in float64 and cast once to the factors' dtype. A result's scale is 1: alpha = rank, everywhere.
"""

from __future__ import annotations

import math
import re
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import replace
from itertools import combinations
from typing import Any

import torch
from torch import Tensor

from onebase.adapters.adapter import Adapter, LowRank, Origin, TokenRows, block
from onebase.adapters.targets import name_matches
from onebase.config import LoraConfig, Recipe
from onebase.errors import BaseMismatch, ConfigError
from onebase.options import require
from onebase.transforms.combining import METHODS, Part, cat, weighted_sum

HEAD_COUNTS = ("rows", "mean", "scale")  # what a head's description has from its own training


def combine(
    adapters: Sequence[Adapter], weights: Sequence[float], recipe: Recipe, allow_base_mismatch: bool = False
) -> Adapter:
    """One adapter made of several, a weight for each; a weight below 0 takes an adapter's effect away.

    A module that only some adapters change is combined from those. A module trained in full is averaged, where
    the weights of its adapters sum to 1 (nothing else is exact without the base) and the method only sums.
    Random draws depend on the seed, the module's path and the adapter's place alone.

    Raises ConfigError for options, weights, ranks or prompt formats that do not go together, BaseMismatch where
    the adapters are for different bases, or do not say for which; `allow_base_mismatch` lets that pass, never
    other shapes.
    """
    _check_call(adapters, weights, recipe)
    _check_plain(adapters, "combine")
    _check_origins(adapters, allow_base_mismatch)
    parts = _parts(adapters, weights)
    _check_parts(parts, adapters, recipe)
    recipe = _ranked(parts, recipe)
    low = {path: _combined(path, here, recipe) for path, here in parts.items()}
    full, tokens = _full(adapters, weights, recipe), _tokens(adapters, weights, recipe)
    return Adapter(_config(adapters, low), low, full, _origin(adapters, weights, recipe), tokens)


def negate(adapter: Adapter) -> Adapter:
    """The adapter whose update is the opposite, to make a base forget a task (Ilharco et al. 2023).

    Exact: only the sign of B and of the biases turns, and `negate(negate(a)) == a`. Raises ConfigError where
    something's opposite cannot be told without the base: modules and token rows trained in full, DoRA.
    """
    _check_plain([adapter], "negate")
    if whole := {**adapter.full, **adapter.tokens}:
        raise ConfigError("negate modules or token rows that were trained in full", _some(whole))
    low = {
        path: update._replace(B=-update.B, bias=None if update.bias is None else -update.bias)
        for path, update in adapter.lowrank.items()
    }
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
    factors = [cat(one, Recipe()) for one in _by_block(parts)]
    small = [torch.linalg.qr(b, mode="r").R @ torch.linalg.qr(a.T, mode="r").R.T for a, b in factors]
    return math.hypot(*(float(torch.linalg.norm(matrix)) for matrix in small))


def _by_block(parts: Sequence[Part]) -> list[list[Part]]:
    """The shares in each block of a module, apart; each draws from random numbers of its own."""
    count = parts[0].low.blocks
    if count == 1:
        return [list(parts)]
    return [
        [part._replace(low=block(part.low, n), name=f"{part.name}#{n}") for part in parts]
        for n in range(count)
    ]


def _parts(adapters: Sequence[Adapter], weights: Sequence[float]) -> dict[str, list[Part]]:
    """Module path -> the share of each adapter that changes it."""
    parts: dict[str, list[Part]] = {}
    for index, (adapter, weight) in enumerate(zip(adapters, weights, strict=True)):
        for path, low in adapter.lowrank.items():
            parts.setdefault(path, []).append(Part(low, weight, f"{index}:{path}"))
    return parts


def _combined(path: str, parts: Sequence[Part], recipe: Recipe) -> LowRank:
    first, run = parts[0].low, METHODS[recipe.method].run
    try:
        factors = [run(one, recipe) for one in _by_block(parts)]
        a, b = (torch.cat(side).to(first.A.dtype) for side in zip(*factors, strict=True))
    except torch.linalg.LinAlgError:  # pyright: ignore[reportPrivateImportUsage]  # the SVD met NaN or infinity
        a = b = torch.tensor(math.nan)
    bias = _bias(parts)
    if not all(tensor.isfinite().all() for tensor in (a, b, bias) if tensor is not None):
        hint = "choose smaller weights, or look for NaN in the adapters"
        raise ConfigError(f"combine {path}", "the result is not finite", hint=hint)
    return LowRank(a, b, 1.0, first.kind, first.blocks, first.kernel, bias)


def _bias(parts: Sequence[Part]) -> Tensor | None:
    """What the updates add to the layer's bias, weighted; the result's scale is 1."""
    held = [(part.low.bias, part.strength) for part in parts if part.low.bias is not None]
    if not held:
        return None
    return weighted_sum([bias.double() for bias, _ in held], [s for _, s in held]).to(held[0][0].dtype)


Shares = dict[str, list[tuple[float, Mapping[str, Tensor]]]]
"""Path -> the weight and the tensors of each adapter that has some there in place of the base's."""


def _averaged(shares: Shares, recipe: Recipe, what: str) -> dict[str, dict[str, Tensor]]:
    """Tensors that replace the base's W: sum of w·W, which is W0 + sum of w·(W - W0) where the weights sum to 1."""
    for path, here in shares.items():
        total, asked = math.fsum(weight for weight, _ in here), f"combine {path}, {what}"
        if not math.isclose(total, 1.0, rel_tol=1e-9):
            found = f"the weights of its adapters sum to {total:g}, which needs the base"
            raise ConfigError(asked, found, hint="let these weights sum to 1")
        if len(here) > 1 and not METHODS[recipe.method].sums:
            found = f"{recipe.method} cannot prune it without the base"
            raise ConfigError(asked, found, [name for name, row in METHODS.items() if row.sums])
    return {
        path: {
            name: weighted_sum([state[name].double() for _, state in here], [w for w, _ in here]).to(
                tensor.dtype
            )
            for name, tensor in here[0][1].items()
        }
        for path, here in shares.items()
    }


def _full(
    adapters: Sequence[Adapter], weights: Sequence[float], recipe: Recipe
) -> dict[str, dict[str, Tensor]]:
    shares: Shares = {}
    for adapter, weight in zip(adapters, weights, strict=True):
        for path, state in adapter.full.items():
            shares.setdefault(path, []).append((weight, state))
    return _averaged(shares, recipe, "trained in full")


def _tokens(adapters: Sequence[Adapter], weights: Sequence[float], recipe: Recipe) -> dict[str, TokenRows]:
    """Token rows, each path's of the same tokens (`_check_parts`)."""
    shares: Shares = {}
    ids: dict[str, tuple[int, ...]] = {}
    for adapter, weight in zip(adapters, weights, strict=True):
        for path, tokens in adapter.tokens.items():
            ids[path] = tokens.ids
            shares.setdefault(path, []).append((weight, {"rows": tokens.rows}))
    made = _averaged(shares, recipe, "token rows")
    return {path: TokenRows(ids[path], state["rows"]) for path, state in made.items()}


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


def _check_plain(adapters: Sequence[Adapter], what: str) -> None:
    """Raise ConfigError where an update is no sum with the weight: DoRA also gives its rows new norms."""
    shaped = {path: None for a in adapters for path, low in a.lowrank.items() if low.magnitude is not None}
    if shaped:
        found = f"it multiplies the weight's rows, which needs the base: {_some(list(shaped), 3)}"
        hint = "rewrite it as plain LoRA first: onebase export --to portable --fit RANK; or merge it into the base"
        raise ConfigError(f"{what} a DoRA adapter", found, hint=hint)


def _check_origins(adapters: Sequence[Adapter], allow_base_mismatch: bool) -> None:
    """The bases must be known to be one; what else is recorded must agree where it is recorded."""
    origins = [adapter.origin for adapter in adapters]
    same = {_same_base(a, b) for a, b in combinations(origins, 2)}
    if not allow_base_mismatch and same - {True}:
        found = _some([f"{o.base or '(no name)'}, fingerprint {o.fingerprint or 'none'}" for o in origins])
        hint = "--allow-base-mismatch if you know that they are the same"
        odd = (
            "the adapters are for different bases" if False in same else "nothing says that the bases are one"
        )
        raise BaseMismatch(odd, found, hint=hint)
    prompts = [dict(origin.prompt) for origin in origins if origin.prompt]
    if any(prompt != prompts[0] for prompt in prompts):
        hint = "say whose the result is to be used with: --prompt-from FOLDER, or replace origin.prompt"
        raise ConfigError("adapters of different prompt formats", _some([str(p) for p in prompts]), hint=hint)
    texts: dict[int, set[str]] = {}
    for text, number in [item for origin in origins for item in origin.tokens.items()]:
        texts.setdefault(number, set()).add(text)
    if odd := [f"{number}: {' and '.join(sorted(own))}" for number, own in texts.items() if len(own) > 1]:
        raise ConfigError("adapters that give new tokens the same ids", _some(odd))
    tasks = {origin.task for origin in origins if origin.task}
    if len(tasks) > 1:
        raise ConfigError("the adapters are for different tasks", ", ".join(sorted(tasks)))
    heads = [
        {key: value for key, value in o.head.items() if key not in HEAD_COUNTS} for o in origins if o.head
    ]
    if any(head != heads[0] for head in heads):
        raise ConfigError("the adapters' heads have different labels", _some([str(head) for head in heads]))


def _same_base(a: Origin, b: Origin) -> bool | None:
    """Fingerprints decide where both have one, else names where both have one; None where nothing does."""
    for mine, theirs in ((a.fingerprint, b.fingerprint), (a.base, b.base)):
        if mine and theirs:
            return mine == theirs
    return None


def _check_parts(parts: Mapping[str, Sequence[Part]], adapters: Sequence[Adapter], recipe: Recipe) -> None:
    """The updates of a module must have one shape and kind; some methods want one rank too."""
    forms: dict[str, set[Any]] = {path: {_form(part.low) for part in here} for path, here in parts.items()}
    problems: list[str] = []
    for adapter in adapters:
        for path, tokens in adapter.tokens.items():
            forms.setdefault(f"rows of {path}", set()).add(("of tokens", *tokens.ids))
        for path, state in adapter.full.items():
            form = tuple(sorted((name, tuple(tensor.shape)) for name, tensor in state.items()))
            forms.setdefault(path, set()).add(form)
            inside = [p for p in parts if f"{p}.".startswith(f"{path}.")]
            problems += [f"{p}: one adapter updates it, another trains {path} in full" for p in inside]
    problems += [f"{path}: {' and '.join(map(str, f))}" for path, f in forms.items() if len(f) > 1]
    if problems:
        raise BaseMismatch("the adapters do not fit one another", _some(problems))
    biased = [path for path, here in parts.items() if any(part.low.bias is not None for part in here)]
    if biased and not METHODS[recipe.method].sums:
        able = [name for name, row in METHODS.items() if row.sums]
        raise ConfigError(f"method {recipe.method} cannot prune what is added to a bias", _some(biased), able)
    ranks = {path: [part.low.rank for part in here] for path, here in parts.items()}
    uneven = [f"{path}: ranks {', '.join(map(str, r))}" for path, r in ranks.items() if len(set(r)) > 1]
    if METHODS[recipe.method].same_rank and uneven:
        able = [name for name, row in METHODS.items() if not row.same_rank]
        raise ConfigError(f"method {recipe.method} needs equal ranks", _some(uneven), able)


def _form(low: LowRank) -> tuple[Any, ...]:
    """What updates of one module must share: (out, in) of each block, and the kind; blocks and kernel where any."""
    size = (low.B.shape[0] // low.blocks, low.A.shape[1], low.kind)
    return (
        *size,
        *([f"{low.blocks} blocks"] if low.blocks > 1 else []),
        *([low.kernel] if low.kernel else []),
    )


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
    low = parts[0].low
    size = min(low.B.shape[0] // low.blocks, low.A.shape[1])
    return min(size, sum(part.low.rank for part in parts)) if sums else size


def _config(adapters: Sequence[Adapter], low: Mapping[str, LowRank]) -> LoraConfig:
    ranks = {path: update.rank for path, update in low.items()}
    rank = Counter(ranks.values()).most_common(1)[0][0] if ranks else adapters[0].config.rank
    odd = {f"^{re.escape(path)}": own for path, own in ranks.items() if own != rank}  # ^: this path alone
    configs = [adapter.config for adapter in adapters]
    parameters = dict.fromkeys(name for config in configs for name in config.target_parameters)
    named = all(isinstance(c.target_modules, tuple) and not (c.exclude_modules or c.layers) for c in configs)
    paths = [path for path in low if not any(name_matches(name, path) for name in parameters)]
    return LoraConfig(
        rank=rank,
        alpha=rank,
        target_modules=sorted({n for c in configs for n in c.target_modules} if named else paths),
        target_parameters=list(parameters),
        lora_bias=any(update.bias is not None for update in low.values()),
        trainable_tokens=sorted(
            {name for config in configs for name in config.trainable_tokens},
            key=lambda name: (len(name), name),  # id:9 before id:10, as they are read back
        ),
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
        tokens={text: number for origin in origins for text, number in origin.tokens.items()},
        head=next((origin.head for origin in origins if origin.head), {}),
        training={
            "combined": [dict(origin.training) for origin in origins],
            "weights": list(weights),
            "method": recipe.method,
            **{name: getattr(recipe, name) for name in METHODS[recipe.method].reads},
        },
    )
