"""Names and regular expressions that mean modules, matched in bounded time: `(a+)+$` from a file could run for years.

The syntax is that of Python's `re` (`options.require_pattern` compiles each pattern with it). The matching is done by
the `regex` package, which gives up after a time; it can also match what `re` would never finish.
"""

from __future__ import annotations

import re
import time
from collections.abc import Sequence
from functools import lru_cache
from typing import Any, NamedTuple, final

import regex

from onebase.errors import ConfigError

SECONDS = 2.0  # that the patterns of one option may take in all
MOST = 200  # regular expressions in one rank_pattern or alpha_pattern
QUICK = 1e-3  # seconds; matches below this are not counted, for there may be many

_PLAIN = re.compile(
    r"\^?(?:[\w-]|\\[^\w\s])+"
)  # a name, with or without ^ before it, its other characters escaped
_DOTTED = re.compile(r"[\w.-]+")
_ESCAPE = re.compile(r"\\(.)")


@final
class _Clock:
    """How long some expressions have taken, together."""

    def __init__(self) -> None:
        self.left = SECONDS

    def fits(self, expression: Any, text: str) -> bool:
        """Whether the expression matches all of the text. Raises ConfigError when the time is up."""
        start = time.perf_counter()
        try:
            found = expression.fullmatch(text, timeout=max(self.left, QUICK)) is not None
        except TimeoutError:
            self.left = 0.0
            asked, where = f"pattern {expression.pattern[:200]!r}", f"on {text[:200]!r} and others"
            hint = "write it without repetitions inside repetitions, or list the names"
            raise ConfigError(asked, f"matching takes more than {SECONDS:g} s {where}", hint=hint) from None
        took = time.perf_counter() - start
        self.left -= took if took > QUICK else 0
        return found


class _Expression(NamedTuple):
    compiled: Any
    clock: _Clock


@lru_cache(maxsize=64)
def _expression(pattern: str) -> _Expression:
    return _Expression(_compiled(pattern), _Clock())


def _compiled(pattern: str) -> Any:
    try:
        return regex.compile(pattern)
    except (regex.error, RecursionError) as error:
        raise ConfigError(f"pattern {pattern[:200]!r}", f"no regular expression: {error}") from error


def matches(pattern: str, path: str) -> bool:
    """Whether a pattern matches a whole path. Raises ConfigError where that takes too long."""
    expression = _expression(pattern)
    return expression.clock.fits(expression.compiled, path)


def ends(path: str) -> list[str]:
    """`a.b.c` -> `a.b.c`, `b.c`, `c`: the names by which PEFT knows a module."""
    parts = path.split(".")
    return [".".join(parts[start:]) for start in range(len(parts))]


@lru_cache(maxsize=64)
def _names(names: tuple[str, ...]) -> frozenset[str]:
    return frozenset(names)


def named(names: Sequence[str], path: str) -> bool:
    """Whether one of the names is the path or its end after a dot. Quick for very many names."""
    known = _names(tuple(names))
    return any(end in known for end in ends(path))


class Keys(NamedTuple):
    """The keys of a rank_pattern or alpha_pattern, by how they are looked up; numbers are places among the keys."""

    paths: dict[str, int]  # whole paths, from keys such as `^model\\.layers\\.0`
    names: dict[str, int]  # ends of paths
    dotted: dict[str, int]  # ends of paths with any character where the key has a dot
    dots: dict[int, set[tuple[int, ...]]]  # length of such a key -> where its dots can be
    others: list[tuple[int, Any]]
    clock: _Clock


@lru_cache(maxsize=64)
def keys_of(keys: tuple[str, ...]) -> Keys:
    """Sort the keys: they are often as many as modules, so that trying each of them on each path would be slow.

    Raises ConfigError where too many are regular expressions.
    """
    found = Keys({}, {}, {}, {}, [], _Clock())
    for number, key in enumerate(keys):
        if _PLAIN.fullmatch(key):
            place = found.paths if key.startswith("^") else found.names
            place.setdefault(_ESCAPE.sub(r"\1", key.removeprefix("^")), number)
        elif _DOTTED.fullmatch(key):
            found.dotted.setdefault(key, number)
            found.dots.setdefault(len(key), set()).add(tuple(n for n, sign in enumerate(key) if sign == "."))
        else:
            found.others.append((number, _compiled(rf"(.*\.)?({key})")))
    if len(found.others) > MOST:
        asked = f"a pattern of {len(found.others)} regular expressions"
        raise ConfigError(asked, f"at most {MOST} can be tried on each module", hint="list plain names")
    return found


def first_key(known: Keys, path: str) -> int | None:
    """The place of the first key that matches the path's end: PEFT's rule for rank_pattern and alpha_pattern.

    Raises ConfigError where the matching takes too long.
    """
    tails = ends(path)
    places = [known.paths.get(path), *(known.names.get(tail) for tail in tails)]
    places += [known.dotted.get(_masked(t, dots)) for t in tails for dots in known.dots.get(len(t), ())]
    first = min((number for number in places if number is not None), default=None)
    earlier = (n for n, one in known.others if (first is None or n < first) and known.clock.fits(one, path))
    return next(earlier, first)


def _masked(text: str, places: Sequence[int]) -> str:
    signs = list(text)
    for place in places:
        signs[place] = "."
    return "".join(signs)
