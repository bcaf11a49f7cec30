"""Trained token rows in PEFT's files, both ways: its tensor names and its `trainable_token_indices`."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, NamedTuple, cast

import torch
from torch import Tensor, nn

from onebase.adapters.adapter import Adapter, TokenRows
from onebase.adapters.targets import name_matches
from onebase.adapters.tokens import token_places

INDICES = "trainable_token_indices"
PREFIX = "base_model.model."  # what PEFT puts before every module's path
_END = ".token_adapter.trainable_tokens_delta"  # a delta in name only: the rows


def to_peft_rows(adapter: Adapter) -> dict[str, Tensor]:
    """The rows under PEFT's tensor names."""
    return {f"{PREFIX}{path}{_END}": tokens.rows for path, tokens in adapter.tokens.items()}


def to_peft_indices(adapter: Adapter) -> dict[str, list[int]]:
    """PEFT's setting: the ids for each module, by its whole path."""
    return {path: list(tokens.ids) for path, tokens in adapter.tokens.items()}


def index_problems(raw: Mapping[str, Any]) -> list[str]:
    """A sentence where the setting is neither null, a list of ids nor a list for each module."""
    value = raw.get(INDICES)
    lists = cast("list[Any]", list(value.values()) if isinstance(value, dict) else [value])
    good = all(
        isinstance(ids, list) and all(type(one) is int for one in cast("list[Any]", ids)) for ids in lists
    )
    return [] if value is None or good else [f"{INDICES}={value!r}: must be ids, or ids for each module"]


def named_ids(raw: Mapping[str, Any]) -> tuple[int, ...]:
    """Every id that the setting names, sorted."""
    return tuple(sorted({token for _, ids in _lists(raw) for token in ids}))


def _lists(raw: Mapping[str, Any]) -> list[tuple[str, list[int]]]:
    """(module name, ids) pairs; a list alone is for the input embedding, whatever its name."""
    value: Any = raw.get(INDICES) or {}
    pairs = value.items() if isinstance(value, dict) else [("", value)]
    return [(str(name), list(ids)) for name, ids in cast("Any", pairs) if ids]


class Sorted(NamedTuple):
    """A file's token rows, its other tensors, and a sentence for each name that the setting does not explain."""

    tokens: dict[str, TokenRows]
    others: dict[str, Tensor]
    problems: list[str]


def take_rows(tensors: Mapping[str, Tensor], raw: Mapping[str, Any]) -> Sorted:
    """Part the token rows from a file's other tensors. Which rows must be there, `missing_rows` knows."""
    tokens: dict[str, TokenRows] = {}
    problems: list[str] = []
    others = {name: tensor for name, tensor in tensors.items() if not name.endswith(_END)}
    for name in sorted(tensors.keys() - others.keys()):
        path, rows = name.removeprefix(PREFIX).removesuffix(_END), tensors[name].to(torch.float32)
        ids = next((ids for key, ids in _lists(raw) if not key or name_matches(key, path)), None)
        if ids is None or not name.startswith(PREFIX):
            problems.append(f"{name}: unexpected, {INDICES} does not name it")
        elif rows.ndim != 2 or len(rows) != len(ids):
            problems.append(f"{name}: shape {tuple(rows.shape)}, but {INDICES} has {len(ids)} ids for it")
        else:
            tokens[path] = TokenRows(tuple(ids), rows)
    if _lists(raw) and not tokens and not problems:
        problems.append(f"{INDICES} is set, but the file holds no token rows")
    return Sorted(tokens, others, problems)


def missing_rows(
    modules: Mapping[str, nn.Module], raw: Mapping[str, Any], tokens: Mapping[str, TokenRows]
) -> list[str]:
    """A sentence for each module that the setting names and the file has no rows for.

    PEFT stores none for a head that is tied to an embedding with the same ids.
    """
    served = token_places(modules, {path: rows for path, rows in tokens.items() if path in modules})
    ids = {path: list(rows.ids) for path, rows in tokens.items()}
    return [
        f"{key}: missing: the config trains token rows of it, the file has none"
        for key, wanted in _lists(raw)
        if key and not any(name_matches(key, place) and ids[path] == wanted for place, path in served.items())
    ]
