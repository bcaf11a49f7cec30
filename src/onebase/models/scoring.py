"""The loss of rows by the fastest way that a model proves to compute exactly: engine, packed rows or padded rows."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from onebase.adapters.adapter import Adapter
from onebase.adapters.injection import injected
from onebase.data.pack import by_length, by_prefix, mixed, pack, pad
from onebase.data.template import Encoded
from onebase.data.trie import layout
from onebase.errors import BaseError
from onebase.models.base import Base
from onebase.models.below import Below
from onebase.models.engine import Engine, engine_problem
from onebase.models.loss import head_outputs, label_loss, loss_sum, pair_loss
from onebase.models.packing import packed_attention, packing_problem

Loss = Callable[[Sequence[Encoded]], Tensor]
"""Rows -> the summed nats of their targets, a scalar with a graph to the chosen adapter's parameters.

A sum, not a mean: the caller divides by the targets of the whole step, so that the loss does not depend on how a
step is cut into batches.
"""

ONE_LABEL, ONE_VECTOR = "a label belongs to a whole row", "a vector belongs to a whole text"
PROBE = "onebase-probe"  # the adapter's name while a way is proven


class Way(NamedTuple):
    """How rows are scored: `engine`, `packed` or `padded`, and why it is no faster way (empty for the engine)."""

    name: str
    reason: str = ""

    @property
    def shown(self) -> str:
        """For a plan or a report."""
        return f"{self.name} ({self.reason})" if self.reason else self.name


class Kept(NamedTuple):
    """Rows whose states below the adapter's first layer are computed once, into a file in the folder."""

    rows: Sequence[Encoded]
    folder: Path


class Thrift(NamedTuple):
    """What the engine may save: memory by computing layers twice, work by computing shared prompts once, and the
    layers below the adapter once for all epochs."""

    checkpoint: bool = False
    share: bool = True
    kept: Kept | None = None


def choose(base: Base, asked: str, adapter: Adapter | None, rows: Sequence[Encoded] = ()) -> Way:
    """The way for an adapter on a base: the first that the model proves. `asked` is auto, engine, packed or padded.

    `rows` are of the kind that will be scored: the proof takes its text from them.
    Raises BaseError where the one that was asked for is not exact on this model.
    """
    if base.reader is not None:
        reason = ONE_LABEL if base.head else ONE_VECTOR
        _refuse_if(asked in ("engine", "packed"), base, asked, reason)
        return Way("padded", reason)
    if asked == "padded":
        return Way("padded", "--engine padded")
    reason = "--engine packed"
    if asked != "packed":
        found = _engine_problem(base, adapter, rows)
        if found is None:
            return Way("engine")
        reason = _refuse_if(asked == "engine", base, "engine", found)
    found = packing_problem(base.model, base.pad_id)  # pyright: ignore[reportArgumentType]
    if found is None:
        return Way("packed", reason)
    return Way("padded", _refuse_if(asked == "packed", base, "packed", found))


def _refuse_if(asked: bool, base: Base, way: str, reason: str) -> str:
    if asked:
        raise BaseError(f"--engine {way} on {base.ref}", reason, hint="use --engine auto")
    return reason


def _engine_problem(base: Base, adapter: Adapter | None, rows: Sequence[Encoded]) -> str | None:
    if adapter is None:
        return "the plain base"
    text = max((row.ids for row in rows), key=len, default=[])
    with injected(base.model, _stirred(adapter), PROBE):
        return engine_problem(base.model, PROBE, text)


def _stirred(adapter: Adapter) -> Adapter:
    """The adapter with every B away from 0, so that a proof sees its updates."""
    draw = torch.Generator().manual_seed(0)
    low = {
        path: one._replace(B=one.B + torch.randn(one.B.shape, generator=draw) * 0.02)
        for path, one in adapter.lowrank.items()
    }
    return replace(adapter, lowrank=low)


class Scorer(NamedTuple):
    """A way at work: the loss of rows, and the cheapest batches where their order does not matter."""

    loss: Loss
    batches: Callable[[Sequence[Encoded], int], list[list[int]]]  # (rows, batch size) -> row indices


def scorer(base: Base, way: Way, name: str, thrift: Thrift = Thrift()) -> Scorer:  # noqa: B008
    """A way that `choose` gave, for the adapter of this name; run it inside `use(model, name)`."""
    model: Any = base.model
    if way.name == "packed":
        return Scorer(packed_loss(model), by_length)
    if way.name == "padded":
        return Scorer(whole_loss(base), by_length if base.embedder is None else mixed)
    return Scorer(engine_loss(Engine(model, name), thrift), by_prefix)


def engine_loss(engine: Engine, thrift: Thrift) -> Loss:
    """Through the engine's own layers."""
    below = Below(engine, *thrift.kept) if thrift.kept else None

    def loss(rows: Sequence[Encoded]) -> Tensor:
        laid = layout(rows, thrift.share)
        return engine.loss(laid, thrift.checkpoint, below.states(rows, laid) if below else None)

    return loss


def packed_loss(model: nn.Module) -> Loss:
    """Through transformers' own layers, rows end to end in one sequence."""

    def loss(rows: Sequence[Encoded]) -> Tensor:
        with packed_attention(model):  # pyright: ignore[reportArgumentType]
            return loss_sum(model, pack(rows))[0]

    return loss


def padded_loss(model: nn.Module, pad_id: int) -> Loss:
    """Through transformers' own layers, rows filled up to the longest."""
    return lambda rows: loss_sum(model, pad(rows, pad_id))[0]


def whole_loss(base: Base) -> Loss:
    """The loss that a base's rows have in padded batches: of their labels, of their pairs, or of their text."""
    model, head, embedder, pad_id = base.model, base.head, base.embedder, base.pad_id
    if embedder is not None:
        return lambda rows: pair_loss(model, rows, embedder, pad_id)
    if head is None:
        return padded_loss(model, pad_id)
    return lambda rows: label_loss(head, head_outputs(model, rows, pad_id), rows)


def loss_tokens(rows: Sequence[Encoded]) -> int:
    """The number of targets in rows; a row's first token never is one."""
    return sum(row.targets for row in rows)
