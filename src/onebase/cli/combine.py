"""`onebase combine`: several adapter folders to one, or one negated or compressed. Needs no base."""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Sequence
from dataclasses import replace
from typing import Any

from rich.table import Table
from rich.text import Text

from onebase.adapters.adapter import Adapter
from onebase.adapters.targets import split_path
from onebase.cli.configs import CombineConfig
from onebase.cli.console import console, table
from onebase.config import build
from onebase.errors import ConfigError, nearest
from onebase.storage.format import read_adapter, save_adapter
from onebase.training.report import count
from onebase.transforms.arithmetic import combine, deviations, negate, norms

WORST = 5


def run(options: dict[str, Any]) -> int:
    """Write the new adapter's folder, then say what became of each update."""
    config = build(CombineConfig, options)
    if not (config.adapters and config.output):
        hint = "onebase combine runs/a,runs/b --output runs/both"
        raise ConfigError("combine", "it needs adapter folders and an --output folder", hint=hint)
    adapters = [_named(read_adapter(folder), folder) for folder in config.adapters]
    if config.prompt_from:
        adapters = _one_prompt(adapters, config)
    weights = _weights(config, len(adapters))
    if config.negate:
        result, weights = negate(adapters[0]), [-1.0]
    else:
        result = combine(adapters, weights, config.recipe, config.allow_base_mismatch)
    save_adapter(result, config.output)
    _print(config, adapters, weights, result)
    return 0


def _named(adapter: Adapter, folder: str) -> Adapter:
    """The adapter, with its folder among the facts that the result keeps of it."""
    training = {"adapter": folder, **adapter.origin.training}
    return replace(adapter, origin=replace(adapter.origin, training=training))


def _one_prompt(adapters: Sequence[Adapter], config: CombineConfig) -> list[Adapter]:
    folders = list(config.adapters)
    if config.prompt_from not in folders:
        near = nearest(config.prompt_from, folders)
        raise ConfigError(f"option prompt_from={config.prompt_from}", "none of the adapters", near)
    prompt = adapters[folders.index(config.prompt_from)].origin.prompt
    return [replace(adapter, origin=replace(adapter.origin, prompt=prompt)) for adapter in adapters]


def _weights(config: CombineConfig, adapters: int) -> list[float]:
    """The weights as numbers, equal ones that sum to 1 where none were given."""
    if not config.weights:
        return [1.0 / adapters] * adapters
    try:
        return [float(text) for text in config.weights.split(",")]
    except ValueError as error:
        found = "must be numbers with commas between them"
        raise ConfigError(f"option weights={config.weights}", found) from error


def _print(
    config: CombineConfig, adapters: Sequence[Adapter], weights: Sequence[float], result: Adapter
) -> None:
    errors = deviations(result, adapters, weights)
    method = "negated" if config.negate else config.recipe.method
    taken = [f"{weight:g} × {folder}" for weight, folder in zip(weights, config.adapters, strict=True)]
    rows = [
        ("method", method),
        ("of", "\n".join(taken)),
        ("size", f"{count(result.parameters)} parameters in {len(result.lowrank)} updates"),
        (
            "averaged, trained in full",
            ", ".join([*result.full, *(f"rows of {p}" for p in result.tokens)]) or "nothing",
        ),
    ]
    console.print(table(f"adapter {config.output}", rows))
    if result.lowrank:
        console.print(_updates(adapters, result))
        worst = sorted(errors, key=errors.__getitem__, reverse=True)[:WORST]
        shown = [(path, f"{errors[path]:.3g}") for path in worst]
        console.print(table("farthest from the exact weighted sum, relative (Frobenius)", shown))


def _updates(adapters: Sequence[Adapter], result: Adapter) -> Table:
    """A row for each target: ranks, and norms of the updates over its layers, one of each adapter and the result's."""
    made = Table("target", "modules", "ranks", "norms of s·B·A", title="updates", title_justify="left")
    groups: dict[str, list[str]] = defaultdict(list)
    for path in result.lowrank:
        stack, layer, rest = split_path(path)
        groups[path if layer is None else f"{stack}.*.{rest}"].append(path)
    everyone = [*adapters, result]
    sizes = [norms(adapter) for adapter in everyone]
    for target, paths in groups.items():
        ranks = [
            "/".join(map(str, sorted({a.lowrank[p].rank for p in paths if p in a.lowrank}))) or "-"
            for a in everyone
        ]
        lengths = [f"{math.hypot(*(own.get(path, 0.0) for path in paths)):.4g}" for own in sizes]
        made.add_row(Text(target), str(len(paths)), _arrow(ranks), _arrow(lengths))
    return made


def _arrow(values: Sequence[str]) -> str:
    return f"{', '.join(values[:-1])} → {values[-1]}"
