"""Attention over token trees: the plan's blocks, its cost, and values and gradients against the whole mask."""

from itertools import pairwise

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from forests import forests, size
from onebase.ops import forest as trees
from onebase.ops import prefix
from onebase.ops.forest import Cut, plan
from onebase.ops.prefix import Heads, Scoring, forest, prefix_attention, prefix_attention_backward
from onebase.ops.reference import prefix_attention_reference, visible, visible_in_tree
from pairs import attached, draw

LONE = [(0, 3, -1), (3, 1, -1), (4, 5, -1)]
TREE = [(0, 4, -1), (4, 2, 0), (6, 3, 0), (9, 1, 2), (10, 2, -1)]
SHUFFLED = [(5, 4, -1), (3, 2, 0), (9, 3, 0), (0, 3, 1), (12, 1, 2)]


def heads(tokens, key_heads=2, groups=3, width=5, value_width=4, dtype=torch.float64):
    shapes = [
        (key_heads, tokens, groups, width),
        (key_heads, tokens, width),
        (key_heads, tokens, value_width),
    ]
    return [draw(*shape, seed=n, dtype=dtype) for n, shape in enumerate(shapes)]


def by_token(x):
    """(n, T, ...) as (T, n, ...), and back."""
    return x.transpose(0, 1)


def planned(nodes, window, like, groups=(2, 3)):
    return forest([(0, nodes)], window, groups, like)


def as_function(made, scoring):
    def forward(*tensors):
        return by_token(prefix_attention(Heads(*map(by_token, tensors)), made, scoring))

    def backward(gradient, *tensors):
        out, into = forward(*tensors), Heads(*(by_token(t).clone() for t in tensors))
        outputs = (by_token(gradient), by_token(out))
        prefix_attention_backward(*outputs, Heads(*map(by_token, tensors)), made, scoring, into)
        return list(map(by_token, into))

    return attached(forward, backward)


def check(nodes, window, scoring):
    tensors = heads(size(nodes))
    made = planned(nodes, window, tensors[0])
    ours = as_function(made, scoring)(*tensors)
    plain = prefix_attention_reference(*tensors, visible_in_tree(nodes, window), scoring)
    torch.testing.assert_close(ours, plain, rtol=0, atol=1e-12)
    gradient = draw(*plain.shape, seed=9).detach()
    one, other = (torch.autograd.grad(y, tensors, gradient) for y in (ours, plain))
    for found, expected in zip(one, other, strict=True):
        torch.testing.assert_close(found, expected, rtol=0, atol=1e-11)


def test_the_reference_mask_by_hand():
    seen = visible_in_tree([(0, 2, -1), (2, 1, 0), (3, 2, 0)], None).int().tolist()
    assert seen == [[1, 0, 0, 0, 0], [1, 1, 0, 0, 0], [1, 1, 1, 0, 0], [1, 1, 0, 1, 0], [1, 1, 0, 1, 1]]
    seen = visible_in_tree([(0, 2, -1), (2, 1, 0), (3, 2, 0)], 2).int().tolist()
    assert seen == [[1, 0, 0, 0, 0], [1, 1, 0, 0, 0], [0, 1, 1, 0, 0], [0, 1, 0, 1, 0], [0, 0, 0, 1, 1]]


@pytest.mark.parametrize("window", [None, 1, 3])
def test_rows_without_a_common_prefix_are_segments(window):
    assert torch.equal(visible_in_tree(LONE, window), visible((3, 1, 5), window, torch.device("cpu")))


@pytest.mark.parametrize("softcap", [None, 0.7])
@pytest.mark.parametrize("window", [None, 1, 3, 50])
@pytest.mark.parametrize(
    "nodes", [LONE, TREE, SHUFFLED, [(0, 1, -1)]], ids=["lone", "tree", "shuffled", "one"]
)
def test_values_and_gradients_are_the_references(nodes, window, softcap):
    check(nodes, window, Scoring(0.6, softcap))


@pytest.mark.parametrize("softcap", [None, 0.7])
def test_gradcheck(softcap):
    nodes = [(0, 3, -1), (3, 2, 0), (5, 1, 0)]
    tensors = heads(6, key_heads=1, groups=2, width=3, value_width=2)
    made = planned(nodes, 3, tensors[0], (1, 2))
    assert torch.autograd.gradcheck(as_function(made, Scoring(0.6, softcap)), tensors)


@settings(max_examples=150)
@given(
    nodes=forests(),
    window=st.none() | st.integers(1, 12),
    cost=st.sampled_from([0, 40, 8192]),
    most=st.integers(2, 12),
)
def test_any_forest_any_plan(nodes, window, cost, most):
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(trees, "MOST_QUERIES", most)
        patch.setattr(prefix, "BLOCK_COST", cost)
        cuts = plan(nodes, window, cost / 6)
        tokens = [token for cut in cuts for token in range(*cut.queries)]
        assert sorted(tokens) == list(range(size(nodes)))
        assert max(stop - start for start, stop in (cut.queries for cut in cuts)) <= max(most, 1)
        check(nodes, window, Scoring(0.5))


def test_a_plan_by_hand():
    nodes = [(0, 4, -1), (4, 2, 0), (6, 3, 0), (9, 5, -1)]
    # Free blocks: each node alone, with its path before it; the first child touches its parent.
    assert plan(nodes, None, 0) == [
        Cut((0, 4), ((0, 4),)),
        Cut((9, 14), ((9, 14),)),
        Cut((4, 6), ((0, 6),)),
        Cut((6, 9), ((0, 4), (6, 9))),
    ]
    # Dear blocks: the two children share one; the roots do not stand side by side.
    assert plan(nodes, None, 1000) == [
        Cut((0, 4), ((0, 4),)),
        Cut((9, 14), ((9, 14),)),
        Cut((4, 9), ((0, 9),)),
    ]
    # A window of 3: a child's first token (position 4) sees positions 2 and 3 above it.
    assert plan(nodes, 3, 0)[2:] == [Cut((4, 6), ((2, 6),)), Cut((6, 9), ((2, 4), (6, 9)))]


def test_a_long_row_is_cut_and_sees_its_past():
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(trees, "MOST_QUERIES", 4)
        assert plan([(0, 10, -1)], None, 1) == [
            Cut((0, 4), ((0, 4),)),
            Cut((4, 8), ((0, 8),)),
            Cut((8, 10), ((0, 10),)),
        ]
        assert plan([(0, 10, -1)], 2, 1)[1:] == [Cut((4, 8), ((3, 8),)), Cut((8, 10), ((7, 10),))]


def cost(groups, above, block_cost):
    return sum((stop - start) * (above + stop - start) + block_cost for start, stop in groups)


@settings(max_examples=100)
@given(
    lengths=st.lists(st.integers(1, 9), min_size=1, max_size=7),
    above=st.integers(1, 40),
    block_cost=st.sampled_from([0, 20, 100, 500]),
)
def test_no_grouping_of_siblings_costs_less(lengths, above, block_cost):
    nodes, end = [(0, above, -1)], above
    for length in lengths:
        nodes.append((end, length, 0))
        end += length
    chosen = [cut.queries for cut in plan(nodes, None, block_cost)[1:]]
    edges = [start for start, _, _ in nodes[1:]]
    every = [
        [*(edge for n, edge in enumerate(edges) if n == 0 or choice >> (n - 1) & 1), end]
        for choice in range(2 ** (len(lengths) - 1))
    ]
    best = min(cost(pairwise(bounds), above, block_cost) for bounds in every)
    assert cost(chosen, above, block_cost) == pytest.approx(best)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_as_exact_as_the_reference(dtype):
    nodes, scoring = [(0, 123, -1), (123, 60, 0), (183, 69, 0), (252, 33, -1)], Scoring(0.2)
    tensors = [t.detach() for t in heads(285, width=16, value_width=16, dtype=dtype)]
    seen = visible_in_tree(nodes, None)
    truth = prefix_attention_reference(*(t.double() for t in tensors), seen, scoring)
    made = planned(nodes, None, tensors[0])
    fast = by_token(prefix_attention(Heads(*map(by_token, tensors)), made, scoring))
    plain = prefix_attention_reference(*tensors, seen, scoring)
    assert fast.dtype == dtype
    errors = [float((y.double() - truth).abs().max()) for y in (fast, plain)]
    assert errors[0] <= errors[1] + 1e-6


def test_no_row_sees_another():
    tensors = [t.detach() for t in heads(size(TREE))]
    made = planned(TREE, None, tensors[0])
    before = by_token(prefix_attention(Heads(*map(by_token, tensors)), made, Scoring(0.5)))
    for tensor in tensors:
        tensor[:, 4:6] += 100  # node 1, which nothing hangs below
    after = by_token(prefix_attention(Heads(*map(by_token, tensors)), made, Scoring(0.5)))
    changed = (before != after).any(dim=(0, 2, 3)).tolist()
    assert changed == [token in (4, 5) for token in range(12)]


@pytest.mark.parametrize(
    ("nodes", "reason"),
    [
        ([(0, 2, 0)], "follows node 0"),
        ([(0, 2, 1), (2, 1, -1)], "follows node 1"),
        ([(0, 2, -1), (2, 0, 0)], "has 0 tokens"),
        ([(0, 2, -1), (3, 1, 0)], "do not stand end to end"),
        ([(0, 2, -1), (1, 2, 0)], "do not stand end to end"),
        ([], "do not stand end to end"),
    ],
)
def test_what_is_no_forest_is_refused(nodes, reason):
    with pytest.raises(ValueError, match=reason):
        planned(nodes, None, torch.zeros(1), (1, 1))
