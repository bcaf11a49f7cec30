"""Causal attention over token trees (forest.py): in C by their cuts, or with torch in blocks with masks."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import accumulate, pairwise
from typing import NamedTuple

import torch
from torch import Tensor

from onebase.ops import kernels
from onebase.ops.forest import Cut, Node, begins, check, plan, trees

# What a block of the torch version costs beside its scores, in scores of one head (measured: forward and backward, 64
# channels a head). Neighbouring siblings share a block where that is cheaper, and a mask hides them from each other.
BLOCK_COST = 8192


class Block(NamedTuple):
    """A cut with its mask: `bias` (queries · groups, keys) is 0 where a query sees a key, else -inf."""

    cut: Cut
    bias: Tensor


class Table(NamedTuple):
    """A forest as attention.c reads it: rows, in int64, of (first token, end).

    In trees and cuts there follow, as (first, end) too, the rows of the next table that belong to it.
    `longest` is the longest tree's tokens, `window` 0 for none.
    """

    trees: Tensor
    cuts: Tensor
    spans: Tensor
    longest: int
    window: int


class Forest(NamedTuple):
    """A batch's token trees, ready for attention: the kernels' table where there are kernels, else torch's blocks."""

    blocks: Sequence[Block]
    table: Table | None = None


class Heads(NamedTuple):
    """q (T, n, g, d), k (T, n, d), v (T, n, dv): n key heads, each with g query heads; or the gradients of these."""

    q: Tensor
    k: Tensor
    v: Tensor


class Scoring(NamedTuple):
    """How scores are made: scale · q·kᵀ, and softcap · tanh(that / softcap) where there is a softcap."""

    scale: float
    softcap: float | None = None


Placed = tuple[int, Sequence[Node]]
"""A forest and the token of the batch at which it begins."""


def forest(placed: Sequence[Placed], window: int | None, heads: tuple[int, int], like: Tensor) -> Forest:
    """A batch's forests, each where it stands, for hidden states like these; `heads` as for `blocks`.

    Raises ValueError where nodes are not a forest that covers its tokens.
    """
    for _, nodes in placed:
        check(nodes)
    if kernels.takes(like):
        cuts = [cut.moved(start) for start, nodes in placed for cut in plan(nodes, window, 0.0)]
        return Forest((), _table(cuts, window))
    return Forest(
        [
            block._replace(cut=block.cut.moved(start))
            for start, nodes in placed
            for block in blocks(nodes, window, heads, like)
        ]
    )


def _table(cuts: Sequence[Cut], window: int | None) -> Table:
    found = trees(cuts)
    ordered = [cut for _, own in found for cut in own]
    ends = [0, *accumulate(len(own) for _, own in found)], [0, *accumulate(len(cut.keys) for cut in ordered)]
    tables = (
        [(*span, *cut) for (span, _), cut in zip(found, pairwise(ends[0]), strict=True)],
        [(*cut.queries, *span) for cut, span in zip(ordered, pairwise(ends[1]), strict=True)],
        [span for cut in ordered for span in cut.keys],
    )
    longest = max(stop - start for (start, stop), _ in found)
    parts = (torch.tensor(rows, dtype=torch.int64) for rows in tables)
    return Table(*parts, longest=longest, window=window or 0)


def blocks(nodes: Sequence[Node], window: int | None, heads: tuple[int, int], like: Tensor) -> list[Block]:
    """A forest's blocks for `heads` = (key heads, query heads for each); masks like `like`, in float32 at least."""
    begin = begins(nodes)
    order = sorted(range(len(nodes)), key=lambda number: nodes[number][0])
    lengths = torch.tensor([nodes[number][1] for number in order])
    node = torch.tensor(order).repeat_interleave(lengths)
    first = torch.tensor([begin[number] for number in order]).repeat_interleave(lengths)
    start = torch.tensor([nodes[number][0] for number in order]).repeat_interleave(lengths)
    position = first + torch.arange(len(node)) - start
    dtype = torch.promote_types(like.dtype, torch.float32)
    made: list[Block] = []
    for cut in plan(nodes, window, BLOCK_COST / (heads[0] * heads[1])):
        asks, gives = (
            torch.arange(*cut.queries)[:, None],
            torch.cat([torch.arange(*span) for span in cut.keys]),
        )
        distance = position[asks] - position[gives]
        # Among a block's keys only the nodes above begin at an earlier position: siblings begin at the same one.
        seen = ((node[asks] == node[gives]) & (distance >= 0)) | (first[gives] < first[asks])
        if window is not None:
            seen &= distance < window
        bias = torch.zeros(seen.shape).masked_fill_(~seen, -torch.inf).repeat_interleave(heads[1], 0)
        made.append(Block(cut, bias.to(like.device, dtype)))
    return made


def prefix_attention(heads: Heads, made: Forest, scoring: Scoring) -> Tensor:
    """Each token's attention to what it sees: (T, n, g, dv), in q's dtype, computed in float32 at least.

    Semantics, for each key head:
        scores = softcap · tanh(scale · q·kᵀ / softcap) + bias       (no tanh where there is no softcap)
        out = softmax(scores)·v
    All g query heads of a key head are rows of one product, so keys and values are not repeated.
    """
    if made.table is not None:
        return _native_attention(heads, made.table, scoring)
    out = heads.q.new_empty(*heads.q.shape[:3], heads.v.shape[-1])
    for block in made.blocks:
        part = _gather(heads, block)
        weights, _ = _weights(part, block, scoring)
        to = _queries(out, block)
        to.copy_((weights @ part.v).view(to.shape))
    return out


def prefix_attention_backward(
    d_out: Tensor, out: Tensor, heads: Heads, made: Forest, scoring: Scoring, into: Heads
) -> None:
    """Write the gradients of q, k and v into `into`. The weights are computed again, piece by piece.

    Semantics:
        dv = wᵀ·d_out
        ds = w · (d_out·vᵀ - rowsum(d_out · out)) · slope of the softcap
        dq = scale · ds·k,  dk = scale · dsᵀ·q
    """
    if made.table is not None:
        return _native_attention_backward((d_out, out), heads, made.table, scoring, into)
    dtype = made.blocks[0].bias.dtype
    along = torch.linalg.vecdot(d_out.to(dtype), out.to(dtype))[..., None]
    d_k, d_v = (torch.zeros(t.transpose(0, 1).shape, dtype=dtype, device=t.device) for t in heads[1:])
    for block in made.blocks:
        part, d_rows = _gather(heads, block), _rows(d_out, block).to(dtype)
        weights, slope = _weights(part, block, scoring)
        own_v = weights.mT @ d_rows
        d_scores = torch.bmm(d_rows, part.v.mT).sub_(_rows(along, block)).mul_(weights)
        if slope is not None:
            d_scores.mul_(slope)
        to = _queries(into.q, block)
        to.copy_(torch.bmm(d_scores, part.k).mul_(scoring.scale).view(to.shape))
        own_k = torch.bmm(d_scores.mT, part.q).mul_(scoring.scale)
        at = 0
        for start, stop in block.cut.keys:
            d_k[:, start:stop] += own_k[:, at : at + stop - start]
            d_v[:, start:stop] += own_v[:, at : at + stop - start]
            at += stop - start
    into.k.copy_(d_k.transpose(0, 1))
    into.v.copy_(d_v.transpose(0, 1))


def _queries(x: Tensor, block: Block) -> Tensor:
    """x (T, n, g, d) at a block's queries, as a view (n, queries, g, d)."""
    start, stop = block.cut.queries
    return x[start:stop].transpose(0, 1)


def _rows(x: Tensor, block: Block) -> Tensor:
    """x (T, n, g, d) at a block's queries, (n, queries · g, d)."""
    return _queries(x, block).flatten(1, 2)


def _gather(heads: Heads, block: Block) -> Heads:
    """A block's queries (n, queries · g, d) and keys and values (n, keys, d), in its mask's dtype."""
    parts = (_rows(heads.q, block), _keys(heads.k, block), _keys(heads.v, block))
    return Heads(*(part.to(block.bias.dtype) for part in parts))


def _keys(x: Tensor, block: Block) -> Tensor:
    """x (T, n, d) at a block's keys, (n, keys, d); a view where they stand together."""
    parts = [x[start:stop] for start, stop in block.cut.keys]
    return (parts[0] if len(parts) == 1 else torch.cat(parts)).transpose(0, 1)


def _weights(part: Heads, block: Block, scoring: Scoring) -> tuple[Tensor, Tensor | None]:
    """softmax of a block's scores (n, queries · g, keys), and the slope of the softcap where there is one."""
    if scoring.softcap is None:
        scores = torch.baddbmm(block.bias[None], part.q, part.k.mT, alpha=scoring.scale)
        return scores.softmax(dim=-1), None
    bent = torch.bmm(part.q, part.k.mT).mul_(scoring.scale / scoring.softcap).tanh_()
    weights = torch.add(block.bias, bent, alpha=scoring.softcap).softmax(dim=-1)
    return weights, bent.square_().neg_().add_(1)


def _native_attention(heads: Heads, table: Table, scoring: Scoring) -> Tensor:
    heads = Heads(*map(_by_row, heads))
    out = heads.q.new_empty(*heads.q.shape[:3], heads.v.shape[-1])
    kernels.call("attention", out, _table_spec(table, heads, scoring), _heads_spec(heads, out), None)
    return out


def _native_attention_backward(
    outputs: tuple[Tensor, Tensor], heads: Heads, table: Table, scoring: Scoring, into: Heads
) -> None:
    heads, (d_out, out) = Heads(*map(_by_row, heads)), map(_by_row, outputs)
    spec = _table_spec(table, heads, scoring)
    kernels.call("attention", out, spec, _heads_spec(heads, out), _heads_spec(into, d_out))


def _by_row(x: Tensor) -> Tensor:
    return x if kernels.by_row(x) else x.contiguous()


def _table_spec(table: Table, heads: Heads, scoring: Scoring) -> kernels.Forest:
    _, key_heads, group, width = heads.q.shape
    pointers = (part.data_ptr() for part in table[:3])
    sizes = (len(table.trees), table.longest, key_heads, group, width, heads.v.shape[-1], table.window)
    return kernels.Forest(*pointers, *sizes, scoring.scale, scoring.softcap or 0.0)


def _heads_spec(heads: Heads, out: Tensor) -> kernels.Heads:
    tensors = (*heads, out)
    return kernels.Heads(*(t.data_ptr() for t in tensors), *(t.stride(0) for t in tensors))
