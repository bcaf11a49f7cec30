"""What commands work with: base and adapter, from `--base` and `--adapter`, and the prompts of `--prompts`."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from onebase.adapters.adapter import Adapter
from onebase.cli.configs import WithAdapter
from onebase.errors import BaseError, ConfigError, DataError, MissingFile, nearest
from onebase.models.base import Base, load_base
from onebase.models.merging import PROMPTS
from onebase.storage.format import load_adapter, read_stored

DEFAULT_BASE = "smollm2-135m"


def open_pair(using: WithAdapter) -> tuple[Base, Adapter | None]:
    """Load the base, by default the one that the adapter names, and the adapter, proven to fit it."""
    if not using.adapter:
        return load_base(using.base or DEFAULT_BASE, using.dtype), None
    base = load_base(base_name(using.base, using.adapter), using.dtype)
    return base, load_adapter(using.adapter, base, using.allow_base_mismatch)


def require_given(config: Any, names: Sequence[str], hint: str) -> None:
    """Raise ConfigError for the first of these options that is empty; `{name}` in the hint stands for its name."""
    for name in names:
        if not getattr(config, name):
            raise ConfigError(f"option {name}", "not given", hint=hint.format(name=name))


def require_text(adapter: Adapter | None) -> None:
    """Raise BaseError for an adapter that gives labels or vectors instead of text."""
    if adapter is not None and not adapter.origin.writes:
        labels = adapter.origin.has_head
        found = "the adapter has a head that gives labels" if labels else "the adapter makes vectors"
        hint = f"use onebase {'predict' if labels else 'embed'}"
        raise BaseError("an answer in words", found, hint=hint)


def base_name(given: str, adapter: str) -> str:
    """The base that was given, else the one that the adapter's folder names. Raises BaseError where it names none."""
    name = given or read_stored(adapter).adapter.origin.base
    if not name:
        found = "it does not say which base it was made for"
        raise BaseError(f"adapter {adapter}", found, hint="give --base")
    return name


def read_prompts(file: str) -> tuple[str, ...]:
    """The prompts of a text file, one a line; three short ones where none is named. Raises MissingFile, DataError."""
    if not file:
        return PROMPTS
    path = Path(file).expanduser()
    if not path.is_file():
        beside = [item.name for item in path.parent.iterdir()] if path.parent.is_dir() else []
        raise MissingFile(f"prompts {path}", "no such file", nearest(path.name, beside))
    try:
        lines = tuple(line for line in path.read_text(encoding="utf-8-sig").splitlines() if line.strip())
    except UnicodeDecodeError as error:
        raise DataError(f"prompts {path}", f"not UTF-8: {error.reason} at byte {error.start + 1}") from error
    if not lines:
        raise DataError(f"prompts {path}", "it holds no prompt")
    return lines
