"""Causal attention over token trees: rows that begin alike share the tokens of their common prefix.

A tree's node is a run of tokens (start, length, parent): tokens [start, start + length) of the layout, and the
number of the node that they continue, or -1. A token sees its own node's past and all tokens of the nodes above. Rows
that share nothing are nodes without parent.

The work is done in blocks: some neighbouring siblings' tokens as queries, the tokens of the nodes above them and their
own as keys, and one mask. `plan` cuts a forest into the blocks that cost least.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Sequence
from itertools import pairwise
from typing import NamedTuple

import torch
from torch import Tensor

Node = tuple[int, int, int]  # start, length, parent
Span = tuple[int, int]  # tokens [start, stop) of the layout

# The most queries in a block: it bounds the memory of the scores, and skips most of what causality hides.
MOST_QUERIES = 256
# What a block costs beside its scores, in scores of one head (measured: forward and backward, 64 channels a head).
BLOCK_COST = 8192


class Cut(NamedTuple):
    """A block as spans of tokens: its queries, and their keys from the root down."""

    queries: Span
    keys: tuple[Span, ...]


class Block(NamedTuple):
    """A block with its mask: `bias` (queries · groups, keys) is 0 where a query sees a key, else -inf."""

    queries: Span
    keys: tuple[Span, ...]
    bias: Tensor

    def moved(self, by: int) -> Block:
        """The block of the same tokens where they stand `by` later."""
        first, last = self.queries
        keys = tuple((start + by, stop + by) for start, stop in self.keys)
        return Block((first + by, last + by), keys, self.bias)


class Heads(NamedTuple):
    """q (n, T, g, d), k (n, T, d), v (n, T, dv): n key heads, each with g query heads; or the gradients of these."""

    q: Tensor
    k: Tensor
    v: Tensor


class Scoring(NamedTuple):
    """How scores are made: scale · q·kᵀ, and softcap · tanh(that / softcap) where there is a softcap."""

    scale: float
    softcap: float | None = None


def begins(nodes: Sequence[Node]) -> list[int]:
    """Each node's first position in its row. Raises ValueError where a node is empty or comes before its parent."""
    found: list[int] = []
    for number, (_, length, parent) in enumerate(nodes):
        if length <= 0 or not -1 <= parent < number:
            raise ValueError(f"node {number} has {length} tokens and follows node {parent}")
        found.append(0 if parent < 0 else found[parent] + nodes[parent][1])
    return found


def plan(nodes: Sequence[Node], window: int | None, block_cost: float) -> list[Cut]:
    """The blocks whose queries are a forest's tokens, each once, for the least cost.

    A block costs its scores, queries times keys, and `block_cost`. Siblings (roots are siblings too) that stand side
    by side may share one, at the price of scores that the mask throws away. With a window of w a token sees itself
    and the w - 1 positions before it; keys that no query sees are left out.
    """
    begin = begins(nodes)
    cuts: list[Cut] = []
    for run in _runs(nodes):
        path = _path(nodes, run[0])
        edges = [nodes[number][0] for number in run] + [sum(nodes[run[-1]][:2])]
        long = edges[-1] - edges[0] > MOST_QUERIES and len(run) == 1
        if long:
            edges = [*range(edges[0], edges[-1], MOST_QUERIES), edges[-1]]
            queries = list(pairwise(edges))
        else:
            queries = _cheapest(edges, begin[run[0]], block_cost)
        for first, last in queries:
            own = (edges[0], last) if long else (first, last)
            hidden = 0 if window is None else begin[run[0]] + first - own[0] - window + 1
            cuts.append(Cut((first, last), _from([*path, own], max(hidden, 0))))
    return cuts


def _runs(nodes: Sequence[Node]) -> list[list[int]]:
    """The nodes' numbers in runs of siblings side by side; a node of more than MOST_QUERIES tokens is alone."""
    siblings: dict[int, list[int]] = defaultdict(list)
    for number in sorted(range(len(nodes)), key=lambda number: nodes[number][0]):
        siblings[nodes[number][2]].append(number)
    runs: list[list[int]] = []
    for family in siblings.values():
        end, long = -1, True
        for number in family:
            start, length, _ = nodes[number]
            if start != end or long or length > MOST_QUERIES:
                runs.append([])
            runs[-1].append(number)
            end, long = start + length, length > MOST_QUERIES
    return runs


def _path(nodes: Sequence[Node], number: int) -> list[Span]:
    """The tokens above a node, from the root down."""
    path: list[Span] = []
    while (number := nodes[number][2]) >= 0:
        path.insert(0, (nodes[number][0], sum(nodes[number][:2])))
    return path


def _cheapest(edges: Sequence[int], above: int, block_cost: float) -> list[Span]:
    """Neighbours with these edges, grouped for the least cost; each sees `above` tokens beside its group."""
    best: list[tuple[float, int]] = [(0.0, 0)]  # up to each edge: the cost, and where the last group starts
    for stop in range(1, len(edges)):
        sizes = [(start, edges[stop] - edges[start]) for start in range(stop)]
        best.append(
            min(
                (best[start][0] + size * (above + size) + block_cost, start)
                for start, size in sizes
                if size <= MOST_QUERIES or start == stop - 1
            )
        )
    groups: list[Span] = []
    stop = len(edges) - 1
    while stop:
        start = best[stop][1]
        groups.insert(0, (edges[start], edges[stop]))
        stop = start
    return groups


def _from(spans: Sequence[Span], hidden: int) -> tuple[Span, ...]:
    """The spans without their first `hidden` tokens, those that touch made one."""
    found: list[Span] = []
    for start, stop in spans:
        cut, hidden = min(hidden, stop - start), max(hidden - (stop - start), 0)
        if start + cut == stop:
            continue
        if found and found[-1][1] == start + cut:
            found[-1] = (found[-1][0], stop)
        else:
            found.append((start + cut, stop))
    return tuple(found)


def blocks(nodes: Sequence[Node], window: int | None, heads: tuple[int, int], like: Tensor) -> list[Block]:
    """A forest's blocks for `heads` = (key heads, query heads for each), with masks in the dtype of `like`.

    Raises ValueError where the nodes are not a forest that covers its tokens.
    """
    begin = begins(nodes)
    if not _covers(nodes):
        raise ValueError(f"the nodes {list(nodes)} do not stand end to end")
    order = sorted(range(len(nodes)), key=lambda number: nodes[number][0])
    lengths = torch.tensor([nodes[number][1] for number in order])
    node = torch.tensor(order).repeat_interleave(lengths)
    first = torch.tensor([begin[number] for number in order]).repeat_interleave(lengths)
    start = torch.tensor([nodes[number][0] for number in order]).repeat_interleave(lengths)
    position = first + torch.arange(len(node)) - start
    made: list[Block] = []
    for queries, keys in plan(nodes, window, BLOCK_COST / (heads[0] * heads[1])):
        asks, gives = torch.arange(*queries)[:, None], torch.cat([torch.arange(*span) for span in keys])
        distance = position[asks] - position[gives]
        # Among a block's keys only the nodes above begin at an earlier position: siblings begin at the same one.
        seen = ((node[asks] == node[gives]) & (distance >= 0)) | (first[gives] < first[asks])
        if window is not None:
            seen &= distance < window
        bias = torch.zeros(seen.shape).masked_fill_(~seen, -torch.inf).repeat_interleave(heads[1], 0)
        made.append(Block(queries, keys, bias.to(like.device, like.dtype)))
    return made


def _covers(nodes: Sequence[Node]) -> bool:
    end = 0
    for start, length, _ in sorted(nodes):
        if start != end:
            return False
        end += length
    return end > 0


def prefix_attention(heads: Heads, made: Sequence[Block], scoring: Scoring) -> Tensor:
    """Each token's attention to what it sees: (n, T, g, dv), in q's dtype, the products in the masks' dtype.

    Semantics, for each block and key head:
        scores = softcap · tanh(scale · q·kᵀ / softcap) + bias       (no tanh where there is no softcap)
        out = softmax(scores)·v
    All g query heads of a key head are rows of one product, so keys and values are not repeated.
    """
    q, _, v = heads
    out = q.new_empty(*q.shape[:3], v.shape[-1])
    for block in made:
        part = _gather(heads, block)
        weights, _ = _weights(part, block, scoring)
        _rows(out, block).copy_(weights @ part.v)
    return out


def prefix_attention_backward(
    d_out: Tensor, out: Tensor, heads: Heads, made: Sequence[Block], scoring: Scoring
) -> Heads:
    """The gradients of q, k and v in the masks' dtype. The weights are computed again, block by block.

    Semantics:
        dv = wᵀ·d_out
        ds = w · (d_out·vᵀ - rowsum(d_out · out)) · slope of the softcap
        dq = scale · ds·k,  dk = scale · dsᵀ·q
    """
    dtype = made[0].bias.dtype
    d_out = d_out.to(dtype)
    along = torch.linalg.vecdot(d_out, out.to(dtype))[..., None]
    d_heads = Heads(*(torch.zeros(t.shape, dtype=dtype, device=t.device) for t in heads))
    for block in made:
        part, d_rows = _gather(heads, block), _rows(d_out, block)
        weights, slope = _weights(part, block, scoring)
        d_v = weights.mT @ d_rows
        d_scores = torch.bmm(d_rows, part.v.mT).sub_(_rows(along, block)).mul_(weights)
        if slope is not None:
            d_scores.mul_(slope)
        _rows(d_heads.q, block).baddbmm_(d_scores, part.k, beta=0, alpha=scoring.scale)
        d_k = torch.bmm(d_scores.mT, part.q).mul_(scoring.scale)
        at = 0
        for start, stop in block.keys:
            d_heads.k[:, start:stop] += d_k[:, at : at + stop - start]
            d_heads.v[:, start:stop] += d_v[:, at : at + stop - start]
            at += stop - start
    return d_heads


def _rows(x: Tensor, block: Block) -> Tensor:
    """x (n, T, g, d) at a block's queries, as a view (n, queries · g, d)."""
    start, stop = block.queries
    return x[:, start:stop].flatten(1, 2)


def _gather(heads: Heads, block: Block) -> Heads:
    """A block's queries (n, queries · g, d) and keys and values (n, keys, d), in its mask's dtype."""
    parts = (_rows(heads.q, block), _keys(heads.k, block), _keys(heads.v, block))
    return Heads(*(part.to(block.bias.dtype) for part in parts))


def _keys(x: Tensor, block: Block) -> Tensor:
    """x (n, T, d) at a block's keys; a view where they stand together."""
    parts = [x[:, start:stop] for start, stop in block.keys]
    return parts[0] if len(parts) == 1 else torch.cat(parts, dim=1)


def _weights(part: Heads, block: Block, scoring: Scoring) -> tuple[Tensor, Tensor | None]:
    """softmax of a block's scores (n, queries · g, keys), and the slope of the softcap where there is one."""
    if scoring.softcap is None:
        scores = torch.baddbmm(block.bias[None], part.q, part.k.mT, alpha=scoring.scale)
        return scores.softmax(dim=-1), None
    bent = torch.bmm(part.q, part.k.mT).mul_(scoring.scale / scoring.softcap).tanh_()
    weights = torch.add(block.bias, bent, alpha=scoring.softcap).softmax(dim=-1)
    return weights, bent.square_().neg_().add_(1)
