"""What a command works with: its base and adapter, from `--base` and `--adapter`."""

from __future__ import annotations

from onebase.adapter import Adapter
from onebase.cli.configs import WithAdapter
from onebase.errors import BaseError
from onebase.format import load_adapter, read_adapter
from onebase.models.base import Base, load_base

DEFAULT_BASE = "smollm2-135m"


def open_pair(using: WithAdapter) -> tuple[Base, Adapter | None]:
    """Load the base, by default the one that the adapter names, and the adapter, proven to fit it."""
    if not using.adapter:
        return load_base(using.base or DEFAULT_BASE, using.dtype), None
    base = load_base(base_name(using.base, using.adapter), using.dtype)
    return base, load_adapter(using.adapter, base, using.allow_base_mismatch)


def base_name(given: str, adapter: str) -> str:
    """The base that was given, else the one that the adapter's folder names. Raises BaseError where it names none."""
    name = given or read_adapter(adapter).origin.base
    if not name:
        found = "it does not say which base it was made for"
        raise BaseError(f"adapter {adapter}", found, hint="give --base")
    return name
