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
    name = using.base or read_adapter(using.adapter).origin.base
    if not name:
        raise BaseError(
            f"adapter {using.adapter}", "it does not say which base it was made for", hint="give --base"
        )
    base = load_base(name, using.dtype)
    return base, load_adapter(using.adapter, base, using.allow_base_mismatch)
