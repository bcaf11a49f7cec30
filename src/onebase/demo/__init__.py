"""The demo's data: synthetic customer-support messages, each with the JSON object that it asks for."""

from __future__ import annotations

from importlib import resources
from pathlib import Path


def read_demo() -> Path:
    """The packaged `support.jsonl`: one JSON row a line, with `prompt`, `completion` and `synthetic`."""
    return Path(str(resources.files(__name__).joinpath("support.jsonl")))
