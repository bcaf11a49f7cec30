"""How options work: a field of a frozen dataclass is a Python keyword, a YAML key and a flag at once."""

from __future__ import annotations

import dataclasses
import re
import sys
from collections.abc import Callable, Mapping
from contextlib import suppress
from dataclasses import field
from functools import cache
from types import UnionType
from typing import Any, Literal, TypeGuard, TypeVar, cast, get_args, get_origin, get_type_hints

from onebase.errors import ConfigError, nearest

T = TypeVar("T")

LONGEST = 100_000  # characters of a regular expression
WANTED: dict[Any, str] = {int: "a whole number", float: "a finite number", str: "text", bool: "true or false"}


def opt(default: Any, help: str) -> Any:
    """A dataclass field with its help text; `default` may be a zero-argument factory such as `list`."""
    if callable(default):
        return field(default_factory=default, metadata={"help": help})
    return field(default=default, metadata={"help": help})


def require(name: str, value: object, ok: bool, wanted: str) -> None:
    """Raise ConfigError that an option must be `wanted`, unless it is ok."""
    if not ok:
        raise ConfigError(f"option {name}={value!r}", f"must be {wanted}")


def fits(hint: Any, value: object) -> bool:
    """Whether a value, such as JSON holds, is of a type. An int is a float too, a bool is no number."""
    origin, inner = get_origin(hint), get_args(hint)
    if origin is Literal:
        return isinstance(value, str) and value in inner
    if origin is UnionType:
        return any(fits(one, value) for one in inner)
    if origin is list:
        return isinstance(value, list | tuple) and all(
            fits(inner[0], item) for item in cast("list[Any]", value)
        )
    if origin is dict:
        return isinstance(value, Mapping) and all(
            fits(inner[1], item) for item in cast("Mapping[Any, Any]", value).values()
        )
    if hint is float:
        return _is_number(value) and abs(value) <= sys.float_info.max  # False for NaN too
    return isinstance(value, hint) and (hint is bool or not isinstance(value, bool))


def _is_number(value: object) -> TypeGuard[int | float]:
    return isinstance(value, int | float) and not isinstance(value, bool)


def wanted(hint: Any) -> str:
    """A type in words, for a message."""
    if get_origin(hint) is Literal:
        return "one of " + ", ".join(get_args(hint))
    if hint in WANTED:
        return WANTED[hint]
    pairs = any(get_origin(one) is dict for one in get_args(hint))
    return f"{'pairs such as q_proj=4' if pairs else 'names'}, with commas between them"


def typed(name: str, hint: Any, value: Any) -> Any:
    """A value as its option's type: text may spell a number (a flag, YAML's `1e-3`), a number may be a text.

    Raises ConfigError that says what was wanted.
    """
    if hint in (int, float) and isinstance(value, str):
        with suppress(ValueError):  # not a number: refused below
            value = hint(value)
    elif hint is str and fits(float, value):
        value = str(value)
    require(name, value, fits(hint, value), wanted(hint))
    return float(value) if hint is float else value


def require_pattern(pattern: str) -> None:
    """Raise ConfigError where a pattern is no regular expression, or longer than any that is meant."""
    if len(pattern) > LONGEST:
        raise ConfigError(
            f"pattern {pattern[:100]!r}...", f"{len(pattern)} characters, at most {LONGEST} are read"
        )
    try:
        re.compile(pattern)
    except (re.error, RecursionError, OverflowError) as error:
        raise ConfigError(f"pattern {pattern!r}", f"no regular expression: {error}") from error


def pairs(name: str, value: Mapping[str, Any] | str, convert: Callable[[str], Any]) -> dict[str, Any]:
    """`a=b,c=d` or a mapping, as a dict with converted values."""
    if isinstance(value, str):
        items = [part.partition("=") for part in value.split(",") if part]
        for key, equals, text in items:
            require(
                name, value, bool(key and equals and text), "pairs such as prompt=question,completion=answer"
            )
        value = {key.strip(): text.strip() for key, _, text in items}
    try:
        return {str(key): convert(item) for key, item in value.items()}
    except (TypeError, ValueError, OverflowError) as error:
        raise ConfigError(f"option {name}={value!r}", str(error)) from error


def names(value: str | list[str] | tuple[str, ...] | None) -> tuple[str, ...]:
    """A list of names, or one string of comma-separated names, as a tuple."""
    if value is None:
        return ()
    if isinstance(value, str):
        value = value.split(",")
    return tuple(part.strip() for part in value if part.strip())


def assign(config: object, **values: object) -> None:
    """Set fields of a frozen dataclass, from its __post_init__."""
    for name, value in values.items():
        object.__setattr__(config, name, value)


_hints = cache(get_type_hints)


def flat_options(config_type: type) -> dict[str, tuple[Any, Any, str]]:
    """All options of a config dataclass and of the ones inside it: name -> (type, default, help)."""
    return _flat_options(config_type())


def _flat_options(default: Any) -> dict[str, tuple[Any, Any, str]]:
    options: dict[str, tuple[Any, Any, str]] = {}
    hints = _hints(type(default))
    for item in dataclasses.fields(default):
        value = getattr(default, item.name)
        if dataclasses.is_dataclass(value):
            inner = _flat_options(value)
            assert not options.keys() & inner.keys(), "an option is declared twice"
            options |= inner
        else:
            plain = list(cast("tuple[Any, ...]", value)) if isinstance(value, tuple) else value
            options[item.name] = (hints[item.name], plain, item.metadata["help"])
    return options


def build(config_type: type[T], options: Mapping[str, Any]) -> T:
    """Make a config from flat options; Raises ConfigError for an unknown name or a wrong type."""
    known = flat_options(config_type)
    for name in options:
        if name not in known:
            raise ConfigError(f"unknown option {name}", "no such option", nearest(name, known))
    return _replaced(config_type(), {name: typed(name, known[name][0], v) for name, v in options.items()})


def _replaced(default: Any, options: Mapping[str, Any]) -> Any:
    values: dict[str, Any] = {}
    for item in dataclasses.fields(default):
        value = getattr(default, item.name)
        if dataclasses.is_dataclass(value):
            values[item.name] = _replaced(value, options)
        elif item.name in options:
            values[item.name] = options[item.name]
    return dataclasses.replace(default, **values)


def flatten(config: Any) -> dict[str, Any]:
    """The flat options of a config, as JSON-ready values: `build(type(c), flatten(c)) == c`."""
    values: dict[str, Any] = {}
    for item in dataclasses.fields(config):
        value = getattr(config, item.name)
        if dataclasses.is_dataclass(value):
            values |= flatten(value)
        else:
            values[item.name] = list(cast("tuple[Any, ...]", value)) if isinstance(value, tuple) else value
    return values
