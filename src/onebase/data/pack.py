"""Rows to batches: pure and seeded, so that the position in the data is the step number alone."""

from __future__ import annotations

import random
from collections.abc import Sequence
from functools import lru_cache
from typing import NamedTuple

import torch
from torch import Tensor

from onebase.data.template import Encoded
from onebase.data.trie import SHORTEST


def epoch_order(count: int, seed: int, epoch: int) -> list[int]:
    """The `count` row indices in the order of one epoch; the same on every machine and in every process."""
    return list(_order(count, seed, epoch))


@lru_cache(maxsize=2)  # every step of an epoch asks for the same order
def _order(count: int, seed: int, epoch: int) -> tuple[int, ...]:
    rows = list(range(count))
    random.Random(f"{seed}:{epoch}").shuffle(rows)
    return tuple(rows)


def steps_per_epoch(count: int, batch_size: int, accumulate: int) -> int:
    """Optimiser steps that see each of `count` rows once; the last may be short."""
    return -(-count // (batch_size * accumulate))


def step_rows(
    count: int, batch_size: int, accumulate: int, seed: int, step: int, groups: tuple[int, ...] = ()
) -> list[list[int]]:
    """The micro-batches (row indices) of optimiser step `step`, counted from 0 over all epochs.

    A pure function: a resumed run asks for its next step and gets what the interrupted one would have got.
    In each epoch every row comes exactly once, and all batches but the last are full. With `groups`, a number
    for each of the `count` rows (`prompt_groups`), rows of one group meet in a batch where they can.
    """
    epoch, within = divmod(step, steps_per_epoch(count, batch_size, accumulate))
    if groups:
        first = within * accumulate
        return [list(rows) for rows in _met(groups, batch_size, seed, epoch)[first : first + accumulate]]
    size = batch_size * accumulate
    rows = _order(count, seed, epoch)[within * size : (within + 1) * size]
    return [list(rows[start : start + batch_size]) for start in range(0, len(rows), batch_size)]


def prompt_groups(rows: Sequence[Encoded]) -> tuple[int, ...]:
    """A number for each row, the same where all ids before the first loss token are the same.

    A row that has fewer of them than are worth sharing (`trie.SHORTEST`) is a group of its own: rows without a
    prompt, which differ from their second token on, are not sorted by their first.
    """
    known: dict[tuple[int, ...], int] = {}
    groups: list[int] = []
    for index, row in enumerate(rows):
        end = next((token for token in range(1, len(row.ids)) if row.loss[token]), len(row.ids))
        key = tuple(row.ids[:end]) if end >= SHORTEST else (-1, index)  # no id is negative
        groups.append(known.setdefault(key, len(known)))
    return tuple(groups)


@lru_cache(maxsize=2)
def _met(groups: tuple[int, ...], batch_size: int, seed: int, epoch: int) -> tuple[tuple[int, ...], ...]:
    """One epoch's batches in which the rows of a group meet.

    The rows of the epoch's order are gathered by group, and a group that is larger than a batch is cut. Each
    batch takes the largest part that still fits, or, where none does, a piece of the smallest. As that puts like
    sizes side by side, the full batches are shuffled at the end.
    """
    members: dict[int, list[int]] = {}
    for row in _order(len(groups), seed, epoch):
        members.setdefault(groups[row], []).append(row)
    parts: dict[int, list[list[int]]] = {}  # by size
    for rows in members.values():
        for start in range(0, len(rows), batch_size):
            part = rows[start : start + batch_size]
            parts.setdefault(len(part), []).append(part)
    batches: list[tuple[int, ...]] = []
    while parts:
        batch: list[int] = []
        while parts and (room := batch_size - len(batch)):
            size = max((size for size in parts if size <= room), default=min(parts))
            part = parts[size].pop()
            if not parts[size]:
                del parts[size]
            batch += part[:room]
            if rest := part[room:]:
                parts.setdefault(len(rest), []).append(rest)
        batches.append(tuple(batch))
    short = batches[-1:] if batches and len(batches[-1]) < batch_size else []
    full = batches[: len(batches) - len(short)]
    random.Random(f"{seed}:{epoch}:batches").shuffle(full)
    return (*full, *short)


def bucketed(lengths: Sequence[int], batch_size: int) -> list[list[int]]:
    """Batches of row indices, shortest rows first, so that a batch pads little; equal lengths keep their order."""
    order = sorted(range(len(lengths)), key=lengths.__getitem__)
    return [order[start : start + batch_size] for start in range(0, len(order), batch_size)]


def by_length(rows: Sequence[Encoded], batch_size: int) -> list[list[int]]:
    """`bucketed` for rows."""
    return bucketed([len(row.ids) for row in rows], batch_size)


def by_prefix(rows: Sequence[Encoded], batch_size: int) -> list[list[int]]:
    """Batches of row indices in which rows that begin alike stand together."""
    order = sorted(range(len(rows)), key=lambda index: rows[index].ids)
    return [order[start : start + batch_size] for start in range(0, len(order), batch_size)]


def mixed(rows: Sequence[Encoded], batch_size: int) -> list[list[int]]:
    """Batches of row indices at random, the same each time, for rows that are measured against their batch."""
    order = _order(len(rows), 0, 0)
    return [list(order[start : start + batch_size]) for start in range(0, len(order), batch_size)]


class Batch(NamedTuple):
    """Rows as tensors. B: rows, or 1 if packed. T: the longest row, or the sum of all lengths if packed.

    `ids` and `positions` are (B, T) int64; `loss` (B, T) bool is true where a token is a target; `lengths`
    are the rows' own, in order.
    """

    ids: Tensor
    positions: Tensor
    loss: Tensor
    lengths: tuple[int, ...]
    packed: bool


class Targets(NamedTuple):
    """What is predicted from where: `logits[rows, columns]` (N, vocabulary) predicts `ids` (N,)."""

    rows: Tensor
    columns: Tensor
    ids: Tensor


def pack(rows: Sequence[Encoded]) -> Batch:
    """Rows end to end in one sequence; positions restart at 0 with each row, and no row predicts the next."""
    lengths = tuple(len(row.ids) for row in rows)
    ids = [token for row in rows for token in row.ids]
    positions = [index for length in lengths for index in range(length)]
    loss = [carries and index > 0 for row in rows for index, carries in enumerate(row.loss)]
    return Batch(torch.tensor([ids]), torch.tensor([positions]), torch.tensor([loss]), lengths, True)


def pad(rows: Sequence[Encoded], pad_id: int) -> Batch:
    """One row each, filled up on the right with `pad_id`, which never carries loss."""
    lengths = tuple(len(row.ids) for row in rows)
    width = max(lengths)
    ids = torch.tensor([row.ids + [pad_id] * (width - len(row.ids)) for row in rows])
    loss = torch.tensor([row.loss + [False] * (width - len(row.loss)) for row in rows])
    loss[:, 0] = False
    return Batch(ids, torch.arange(width).expand(len(rows), width), loss, lengths, False)


def attention_mask(batch: Batch) -> Tensor:
    """(B, T) int64 of a padded batch: 1 on a row's tokens, 0 on padding."""
    if batch.packed:
        raise ValueError("a packed batch has no padding; its rows are told apart by their positions")
    return (batch.positions < torch.tensor(batch.lengths)[:, None]).long()


def targets(batch: Batch) -> Targets:
    """The targets of a packed or padded batch, row by row: token t is predicted by the logits at t-1."""
    rows, columns = batch.loss.nonzero(as_tuple=True)
    return Targets(rows, columns - 1, batch.ids[rows, columns])
