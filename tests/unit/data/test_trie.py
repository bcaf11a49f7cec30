"""Layouts: every row is still there, every target keeps its prefix, and as little as possible is stored."""

from __future__ import annotations

import itertools

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from onebase.data.pack import pack, targets
from onebase.data.template import Encoded
from onebase.data.trie import SHORTEST, Node, filled, filled_length, layout, stored_tokens

SHORT = st.integers(1, 5)


@st.composite
def alike_rows(draw, most=6):
    """Rows over a tiny alphabet, some grown from others, so that prefixes, doubles and nested rows are common."""
    rows = []
    for index in range(draw(st.integers(1, most))):
        ids = draw(st.lists(st.integers(0, 2), min_size=1, max_size=8))
        if rows and draw(st.booleans()):
            other = draw(st.sampled_from(rows)).ids
            ids = other[: draw(st.integers(0, len(other)))] + ids * draw(st.integers(0, 1)) or other
        loss = draw(st.lists(st.booleans(), min_size=len(ids), max_size=len(ids)))
        rows.append(Encoded(index, ids, loss))
    return rows


def row(ids, first_loss=1):
    return Encoded(0, list(ids), [index >= first_loss for index in range(len(ids))])


def prefix(made, column):
    """The ids from a row's start up to this place of the layout."""
    number = next(i for i, n in enumerate(made.nodes) if n.start <= column < n.start + n.length)
    ids = made.ids[made.nodes[number].start : column + 1].tolist()
    while (number := made.nodes[number].parent) >= 0:
        node = made.nodes[number]
        ids = made.ids[node.start : node.start + node.length].tolist() + ids
    return tuple(ids)


def prefixes(rows):
    return [tuple(r.ids[:end]) for r in rows for end in range(1, len(r.ids) + 1)]


def fewest(rows, shortest):
    """The least that can be stored, by trying every set of shared prefixes that end where rows part."""
    shared = {}
    for p in prefixes(rows):
        having = tuple(i for i, r in enumerate(rows) if tuple(r.ids[: len(p)]) == p)
        if len(having) > 1:
            shared[having] = max(shared.get(having, 0), len(p))
    best = sum(len(r.ids) for r in rows)
    for chosen in itertools.chain(*(itertools.combinations(shared, n) for n in range(len(shared) + 1))):
        above = [max((shared[o] for o in chosen if set(own) < set(o)), default=0) for own in chosen]
        if all(shared[own] - start >= shortest for own, start in zip(chosen, above, strict=True)):
            nodes = sum(shared[own] - start for own, start in zip(chosen, above, strict=True))
            tails = [
                len(r.ids) - max((shared[c] for c in chosen if i in c), default=0) for i, r in enumerate(rows)
            ]
            best = min(best, nodes + sum(tails))
    return best


@given(alike_rows(), st.booleans(), SHORT)
def test_every_target_keeps_its_prefix(rows, share, shortest):
    made = layout(rows, share, shortest)
    found = [(prefix(made, column), t) for column, t in zip(made.columns.tolist(), made.targets, strict=True)]
    wanted = [(tuple(r.ids[:t]), r.ids[t]) for r in rows for t in range(1, len(r.ids)) if r.loss[t]]
    assert found == wanted  # in this order too, which is that of the packed batch
    assert torch.equal(made.targets, targets(pack(rows)).ids)


@given(alike_rows(), st.booleans(), SHORT)
def test_the_layout_holds_the_rows_and_nothing_else(rows, share, shortest):
    made = layout(rows, share, shortest)
    stored = [prefix(made, column) for column in range(stored_tokens([made]))]
    assert set(stored) == set(prefixes(rows))
    assert made.positions.tolist() == [len(p) - 1 for p in stored]
    assert {made.ids.dtype, made.positions.dtype, made.columns.dtype, made.targets.dtype} == {torch.long}
    if not share:
        assert stored == prefixes(rows)
        assert [n.length for n in made.nodes] == [len(r.ids) for r in rows]
        assert {n.parent for n in made.nodes} == {-1}


@given(alike_rows(), SHORT)
def test_no_layout_stores_fewer_tokens(rows, shortest):
    assert stored_tokens([layout(rows, True, shortest)]) == fewest(rows, shortest)


@given(alike_rows(most=12))
def test_without_a_shortest_prefix_each_is_stored_once(rows):
    assert stored_tokens([layout(rows, True, 1)]) == len(set(prefixes(rows)))


@given(alike_rows(), st.booleans(), SHORT)
def test_nodes_stand_depth_first_and_shared_ones_are_long_enough(rows, share, shortest):
    made = layout(rows, share, shortest)
    assert [n.start for n in made.nodes] == [
        0,
        *itertools.accumulate(n.length for n in made.nodes),
    ][: len(made.nodes)]
    chains = []
    for node in made.nodes:
        chains.append([*(chains[node.parent] if node.parent >= 0 else []), node])
    for number, node in enumerate(made.nodes):
        assert node.length > 0
        assert node.parent < number
        below = [i for i, chain in enumerate(chains) if node in chain]
        assert below == list(range(number, number + len(below)))
        if len(below) > 1:  # a node with others below it is shared
            assert node.length >= shortest


@given(alike_rows(), SHORT, st.randoms(use_true_random=False))
def test_the_order_of_rows_does_not_change_what_is_stored(rows, shortest, random):
    other = random.sample(rows, len(rows))
    one, two = layout(rows, True, shortest), layout(other, True, shortest)
    assert sorted(prefix(one, c) for c in range(len(one.ids))) == sorted(
        prefix(two, c) for c in range(len(two.ids))
    )


def test_a_prompt_with_three_answers_by_hand():
    prompt = list(range(10, 20))
    made = layout([row([*prompt, 1, 2], 10), row([5, 6], 1), row([*prompt, 1, 3], 10), row(prompt, 9)], True)
    # The two that begin with 1 share 11 tokens; a node for that one token more would be too short.
    assert made.ids.tolist() == [*prompt, 1, 2, 1, 3, 5, 6]
    assert made.positions.tolist() == [*range(10), 10, 11, 10, 11, 0, 1]
    assert made.nodes == (Node(0, 10, -1), Node(10, 2, 0), Node(12, 2, 0), Node(14, 2, -1))
    assert made.columns.tolist() == [9, 10, 14, 9, 12, 8]
    assert made.targets.tolist() == [1, 2, 6, 1, 3, 19]


def test_the_larger_saving_wins():
    """Two pairs share 15 tokens each, all four only 8: two nodes of 15 store less than one of 8."""
    common, left, right = list(range(8)), [21] * 7, [22] * 7
    rows = [row([*common, *side, end]) for side in (left, right) for end in (1, 2)]
    made = layout(rows, True)
    assert made.nodes[0] == Node(0, 15, -1)
    assert stored_tokens([made]) == 2 * (15 + 2) == fewest(rows, SHORTEST)
    three = [row([*common, *left, 1]), row([*common, *left, 2]), row([*common, 9])]
    assert layout(three, True).nodes[0] == Node(0, 8, -1)


@pytest.mark.parametrize(
    ("rows", "nodes"),
    {
        "the same row three times": ([row(range(9))] * 3, [Node(0, 9, -1)]),
        "too short to share": ([row(range(7))] * 2, [Node(0, 7, -1), Node(7, 7, -1)]),
        "a row that is another's prefix": ([row(range(12)), row(range(9))], [Node(0, 9, -1), Node(9, 3, 0)]),
        "single tokens": ([row([1]), row([1])], [Node(0, 1, -1), Node(1, 1, -1)]),
        "no rows": ([], []),
        "a row without tokens": ([row([]), row([1, 2])], [Node(0, 2, -1)]),
    }.values(),
)
def test_shapes_of_tries(rows, nodes):
    made = layout(rows, True)
    assert list(made.nodes) == nodes
    assert len(made.targets) == sum(max(len(r.ids) - 1, 0) for r in rows)


def test_rows_without_loss_have_no_targets():
    made = layout([Encoded(0, [1, 2, 3], [False] * 3), Encoded(1, [4], [True])], True)
    assert made.columns.shape == made.targets.shape == (0,)
    assert made.columns.dtype == made.targets.dtype == torch.long
    assert stored_tokens([made, made]) == 8


def test_a_thousand_nested_rows():
    """Deeper than a recursion could go."""
    rows = [row([1] * length) for length in range(1, 1201, 2)]
    made = layout(rows, True, 1)
    assert stored_tokens([made]) == 1199
    assert made.nodes[-1] == Node(1197, 2, 598)


def test_filled_lengths_by_hand():
    assert [filled_length(n) for n in (0, 1, 8, 9, 511, 512, 513, 1023, 1025, 5000)] == [
        *(0, 8, 8, 16, 512, 512, 528, 1024, 1056, 5120)
    ]


@given(st.integers(1, 10**6))
def test_a_filled_length_is_near_and_one_of_few(tokens):
    found = filled_length(tokens)
    assert tokens <= found < tokens + max(8, tokens // 32 + 1)
    assert filled_length(found) == found
    assert len({filled_length(n) for n in range(tokens, 2 * tokens, max(1, tokens // 500))}) <= 34


@given(alike_rows())
def test_a_filled_layout_begins_with_the_layout_and_its_rest_is_a_row_without_targets(rows):
    made = layout(rows, True, 2)
    more = filled(made)
    count, whole = len(made.ids), len(more.ids)
    assert whole == filled_length(count)
    assert torch.equal(more.ids[:count], made.ids)
    assert more.positions.tolist() == [*made.positions.tolist(), *range(whole - count)]
    assert more.nodes[: len(made.nodes)] == made.nodes
    assert more.nodes[len(made.nodes) :] == (((count, whole - count, -1),) if whole > count else ())
    assert torch.equal(more.columns, made.columns)
    assert torch.equal(more.targets, made.targets)
