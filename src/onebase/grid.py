"""Several values for an option make a grid of runs: which options may vary, and each run's name and options."""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Mapping
from itertools import product
from typing import Any, NamedTuple, cast, get_type_hints

from onebase.config import TrainConfig
from onebase.errors import ConfigError
from onebase.options import flat_options, opt

# What may differ between the runs of a sweep: the adapter, its learning and the seed. All else decides which base,
# rows and batches there are, and is the same for all.
SWEPT = (
    *(
        "rank",
        "alpha",
        "dropout",
        "target_modules",
        "exclude_modules",
        "layers",
        "rslora",
        "dora",
        "lora_bias",
    ),
    *("init", "lr", "lora_plus", "freeze_a", "schedule", "warmup", "weight_decay", "beta1", "beta2", "eps"),
    *("clip", "seed"),
)
LISTS = ("target_modules", "exclude_modules", "layers")  # one value of these may hold commas
SWITCHES = {"on": True, "true": True, "off": False, "false": False}
Values = str | float | bool  # of a swept option on the command line: text, or the single value that YAML has


class Point(NamedTuple):
    """One run of a grid: a name for its folder, what it alone has, and all its options but the folder."""

    name: str
    varied: dict[str, Any]
    options: dict[str, Any]


def grid(options: Mapping[str, Any]) -> list[Point]:
    """Every combination of the values, the last option's fastest: `rank="4,8"` or `rank=[4, 8]`.

    Values of LISTS have `;` between them: `target_modules="q_proj,v_proj;all-linear"`. Raises ConfigError where an
    option has several values that may not, where none has, and where two runs would be the same.
    """
    found = {name: _values(name, given) for name, given in options.items()}
    varied = [name for name, values in found.items() if len(values) > 1]
    if not varied:
        hint = "give several values to one option at least, such as --rank 4,8; for one run: onebase train"
        raise ConfigError("sweep", "no option has several values", hint=hint)
    fixed = {name: values[0] for name, values in found.items() if name not in varied}
    points: list[Point] = []
    for values in product(*(found[name] for name in varied)):
        own = dict(zip(varied, values, strict=True))
        points.append(Point("_".join(f"{n}-{_slug(v)}" for n, v in own.items()), own, {**fixed, **own}))
    names = [point.name for point in points]
    if twice := sorted({name for name in names if names.count(name) > 1}):
        raise ConfigError("sweep", f"two runs would be the same: {', '.join(twice)}")
    return points


def _values(name: str, given: Any) -> list[Any]:
    """The values of an option, one at least."""
    if name not in SWEPT:
        hint = flat_options(TrainConfig).get(name, (str,))[0]
        if hint in (int, float) and isinstance(given, str) and "," in given:
            found = "it must be the same for all runs of a sweep"
            raise ConfigError(f"option {name}={given}", found, hint=f"these may vary: {', '.join(SWEPT)}")
        return [given]
    if isinstance(given, str):
        parts = [part.strip() for part in given.split(";" if name in LISTS else ",")]
        values: list[Any] = [part for part in parts if part] or [given]
    elif isinstance(given, list | tuple) and name not in LISTS:
        values = list(cast("list[Any]", given))
    else:
        values = [given]
    if flat_options(TrainConfig)[name][0] is bool:
        values = [SWITCHES.get(str(value).lower(), value) for value in values]
    return values


def _slug(value: Any) -> str:
    """A value as a part of a folder's name."""
    text = {True: "on", False: "off"}[value] if isinstance(value, bool) else str(value)
    return re.sub(r"[^A-Za-z0-9.+_]+", "-", text).strip("-") or "none"


def swept_options(config: Any, **more: Any) -> type:
    """A config class like this config's, in which SWEPT options take `Values`; `more` are further fields."""
    hints = get_type_hints(type(config))
    fields: list[tuple[str, Any, Any]] = []
    for item in dataclasses.fields(config):
        value = getattr(config, item.name)
        if dataclasses.is_dataclass(value):
            inner = swept_options(value)
            fields.append((item.name, inner, opt(inner, "")))
        elif item.name in SWEPT:
            shown = {True: "on", False: "off"}[value] if isinstance(value, bool) else value
            text = ",".join(shown) if isinstance(shown, tuple) else str(shown)
            fields.append((item.name, Values, opt(text, item.metadata["help"])))
        else:
            kept = list(cast("tuple[Any, ...]", value)) if isinstance(value, tuple) else value
            default = (lambda kept=kept: kept) if isinstance(kept, list | dict) else kept
            fields.append((item.name, hints[item.name], opt(default, item.metadata["help"])))
    fields += [(name, type(field.default), field) for name, field in more.items()]
    return dataclasses.make_dataclass(
        type(config).__name__, fields, namespace={"__doc__": type(config).__doc__}, frozen=True
    )
