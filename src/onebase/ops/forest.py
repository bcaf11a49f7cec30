"""Token trees: rows that begin alike share the tokens of their common prefix, and how their attention is cut up.

A tree's node is a run of tokens (start, length, parent): tokens [start, start + length) of the layout, and the
number of the node that they continue, or -1. A token sees its own node's past and all tokens of the nodes above. Rows
that share nothing are nodes without parent.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Sequence
from itertools import pairwise
from typing import NamedTuple

Node = tuple[int, int, int]  # start, length, parent
Span = tuple[int, int]  # tokens [start, stop) of the layout

# The most queries in a cut: it bounds the memory of the scores, and skips most of what causality hides.
MOST_QUERIES = 256


class Cut(NamedTuple):
    """Attention's work in pieces, as spans of tokens: some queries, and their keys from the root down."""

    queries: Span
    keys: tuple[Span, ...]

    def moved(self, by: int) -> Cut:
        """The cut of the same tokens where they stand `by` later."""
        first, last = self.queries
        return Cut((first + by, last + by), tuple((start + by, stop + by) for start, stop in self.keys))


def begins(nodes: Sequence[Node]) -> list[int]:
    """Each node's first position in its row. Raises ValueError where a node is empty or comes before its parent."""
    found: list[int] = []
    for number, (_, length, parent) in enumerate(nodes):
        if length <= 0 or not -1 <= parent < number:
            raise ValueError(f"node {number} has {length} tokens and follows node {parent}")
        found.append(0 if parent < 0 else found[parent] + nodes[parent][1])
    return found


def plan(nodes: Sequence[Node], window: int | None, block_cost: float) -> list[Cut]:
    """The cuts whose queries are a forest's tokens, each once, for the least cost.

    A cut costs its scores, queries times keys, and `block_cost`. Siblings (roots are siblings too) that stand side
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


def check(nodes: Sequence[Node]) -> None:
    """Raise ValueError where the nodes are not a forest that covers its tokens."""
    begins(nodes)
    if not _covers(nodes):
        raise ValueError(f"the nodes {list(nodes)} do not stand end to end")


def _covers(nodes: Sequence[Node]) -> bool:
    end = 0
    for start, length, _ in sorted(nodes):
        if start != end:
            return False
        end += length
    return end > 0


def trees(cuts: Sequence[Cut]) -> list[tuple[Span, list[Cut]]]:
    """The cuts by the tokens that they and no others read: each such span of the layout, and its cuts."""
    found: list[tuple[Span, list[Cut]]] = []
    for cut in sorted(cuts, key=lambda cut: min(cut.queries[0], *(start for start, _ in cut.keys))):
        spans = (cut.queries, *cut.keys)
        first, last = min(start for start, _ in spans), max(stop for _, stop in spans)
        own = [cut]
        while found and found[-1][0][1] > first:
            (start, stop), before = found.pop()
            first, last, own = min(first, start), max(last, stop), before + own
        found.append(((first, last), own))
    return found
