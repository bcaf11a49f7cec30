"""Rows that begin alike as one layout: a trie of tokens, in which a shared prefix stands only once.

By causality a token's state depends on the tokens before it alone, so rows that begin with the same tokens share
those states exactly. What a batch costs is then its distinct prefixes, not its rows.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterable, Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from onebase.data.template import Encoded

# Tokens. A shared prefix costs attention calls of its own and ties its rows into one tree; a few tokens, such as a
# chat template's first ones, are not worth that.
SHORTEST = 8


class Node(NamedTuple):
    """Tokens [start, start + length) of a layout; `parent` is the index of the node that they follow, or -1."""

    start: int
    length: int
    parent: int


class Layout(NamedTuple):
    """Rows as tensors, shared prefixes once. T: the stored tokens. N: the targets, those of every row.

    `ids` and `positions` (T,) int64: a token and its place in its row. A token attends to its node's tokens up to
    itself and to all tokens of the nodes above. Nodes stand depth first: what hangs below a node follows it without
    a gap. `columns` and `targets` (N,) int64: the state at `columns[i]` predicts the id `targets[i]`; the pairs come
    row by row as in `data.pack.targets`, and a pair that several rows have comes as often. `rows` (T,) int64: a row
    that the token belongs to, of several any.
    """

    ids: Tensor
    positions: Tensor
    nodes: tuple[Node, ...]
    columns: Tensor
    targets: Tensor
    rows: Tensor


class _Run(NamedTuple):
    """Rows that agree on their first `end` tokens and no further; `parent`: the index of the next larger such set."""

    rows: tuple[int, ...]
    end: int
    parent: int = -1


def layout(rows: Sequence[Encoded], share: bool, shortest: int = SHORTEST) -> Layout:
    """The rows as a layout: one node a row, or with `share` the trie that stores the fewest tokens.

    Each node is a maximal run of tokens that the same rows share; one that several rows share has at least
    `shortest` tokens (1 or more), else its tokens are stored with each branch. A row without tokens has no node.
    """
    paths = _paths([row.ids for row in rows], shortest) if share else [[] for _ in rows]
    ids: list[int] = []
    positions: list[int] = []
    owners: list[int] = []
    nodes: list[Node] = []
    places: list[list[int]] = [[] for _ in rows]  # of each row's tokens in the layout
    known: dict[_Run, Node] = {}
    numbers: dict[_Run, int] = {}
    # Sorted so that the rows below a node are neighbours; a run is named by its first row.
    for row in sorted(range(len(rows)), key=lambda row: (*(run.rows[0] for run in paths[row]), row)):
        parent, begin = -1, 0
        for run in (*paths[row], _Run((row,), len(rows[row].ids))):
            if run.end == begin:  # the row ends with a shared prefix
                continue
            if run not in known:
                numbers[run], known[run] = len(nodes), Node(len(ids), run.end - begin, parent)
                nodes.append(known[run])
                ids += rows[row].ids[begin : run.end]
                positions += range(begin, run.end)
                owners += [row] * (run.end - begin)
            start, length, _ = known[run]
            places[row] += range(start, start + length)
            parent, begin = numbers[run], run.end
    pairs = [
        (places[index][token - 1], row.ids[token])
        for index, row in enumerate(rows)
        for token in range(1, len(row.ids))
        if row.loss[token]
    ]
    columns, targets = torch.tensor(pairs, dtype=torch.long).reshape(-1, 2).T.contiguous()
    return Layout(
        torch.tensor(ids, dtype=torch.long),
        torch.tensor(positions, dtype=torch.long),
        tuple(nodes),
        columns,
        targets,
        torch.tensor(owners, dtype=torch.long),
    )


def filled_length(tokens: int) -> int:
    """The next length of a small set: a multiple of 8, from 512 on of a power of two, a 64th to a 32nd of the length.

    oneDNN compiles products for each length that it sees and keeps them as long as the process lives: 14 to 18 MB a
    length, seen with 135 M parameters, so that runs grew by gigabytes. Between a number and its double are 32 lengths.
    """
    grain = 1 << max(3, tokens.bit_length() - 6)
    return -(-tokens // grain) * grain


def filled(made: Layout) -> Layout:
    """The layout with tokens at its end that nothing looks at and that predict nothing, up to `filled_length`."""
    count = len(made.ids)
    spare = filled_length(count) - count
    if not spare:
        return made
    return made._replace(
        ids=torch.cat([made.ids, made.ids.new_zeros(spare)]),
        positions=torch.cat([made.positions, torch.arange(spare)]),
        rows=torch.cat([made.rows, made.rows.new_zeros(spare)]),
        nodes=(*made.nodes, Node(count, spare, -1)),
    )


def stored_tokens(layouts: Iterable[Layout]) -> int:
    """How many tokens the layouts store: what the body of a model computes."""
    return sum(len(one.ids) for one in layouts)


def _paths(ids: Sequence[list[int]], shortest: int) -> list[list[_Run]]:
    """The shared runs that become nodes, for each row from its start on."""
    paths: list[list[_Run]] = [[] for _ in ids]
    for run in _chosen(_runs(ids), shortest):
        for row in run.rows:
            paths[row].append(run)
    return paths


def _runs(ids: Sequence[list[int]]) -> list[_Run]:
    """Every set of two rows or more that agree on something that no larger set agrees on; larger sets first."""
    runs: list[_Run] = []
    groups: list[tuple[list[int], int]] = [(list(range(len(ids))), -1)]
    while groups:
        rows, parent = groups.pop()
        if len(rows) < 2:
            continue
        # What the first and the last in alphabetical order share, all between them share.
        low, high = min(ids[row] for row in rows), max(ids[row] for row in rows)
        end = next((i for i, (a, b) in enumerate(zip(low, high, strict=False)) if a != b), len(low))
        branches: dict[int, list[int]] = defaultdict(list)
        for row in rows:
            if len(ids[row]) > end:
                branches[ids[row][end]].append(row)
        groups += [(branch, len(runs)) for branch in branches.values()]
        runs.append(_Run(tuple(rows), end, parent))
    return runs


def _chosen(runs: Sequence[_Run], shortest: int) -> list[_Run]:
    """The runs that become nodes, so that the fewest tokens are stored; larger sets first.

    A run's node begins where the nearest chosen run around it ends, so what the runs inside can save depends on
    that place. `inside[run][place]` is the most that they save, filled from the smallest sets up.
    """
    begins: list[set[int]] = []  # the places where each run's node may begin
    for run in runs:
        begins.append(begins[run.parent] | {runs[run.parent].end} if run.parent >= 0 else {0})
    inside: list[dict[int, int]] = [defaultdict(int) for _ in runs]

    def saving(index: int, begin: int) -> int:
        rows, end, _ = runs[index]
        return (len(rows) - 1) * (end - begin) + inside[index][end] if end - begin >= shortest else -1

    for index in reversed(range(len(runs))):
        if (parent := runs[index].parent) >= 0:
            for begin in begins[index]:
                inside[parent][begin] += max(saving(index, begin), inside[index][begin])
    ends: list[int] = []  # where a node below each run begins
    chosen: list[_Run] = []
    for index, run in enumerate(runs):
        begin = ends[run.parent] if run.parent >= 0 else 0
        take = saving(index, begin) > inside[index][begin]
        ends.append(run.end if take else begin)
        chosen += [run] if take else []
    return chosen
