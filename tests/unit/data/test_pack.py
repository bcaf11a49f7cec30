"""Batches: every row once an epoch, and packed and padded batches ask the same questions."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from onebase.data.pack import (
    attention_mask,
    bucketed,
    epoch_order,
    pack,
    pad,
    prompt_groups,
    step_rows,
    steps_per_epoch,
    targets,
)
from onebase.data.template import Encoded

SIZES = st.integers(1, 7)


@st.composite
def encoded_rows(draw):
    count = draw(st.integers(1, 5))
    rows = []
    for row in range(count):
        loss = draw(st.lists(st.booleans(), min_size=1, max_size=6))
        # Ids name (row, token), so that a wrong index cannot go unseen.
        rows.append(Encoded(row, [row * 100 + token for token in range(len(loss))], loss))
    return rows


@given(st.integers(1, 40), SIZES, SIZES, st.integers(0, 3), st.integers(0, 2))
def test_each_epoch_sees_each_row_once(count, batch_size, accumulate, seed, epoch):
    steps = steps_per_epoch(count, batch_size, accumulate)
    micro = [step_rows(count, batch_size, accumulate, seed, epoch * steps + step) for step in range(steps)]
    assert [row for step in micro for rows in step for row in rows] == epoch_order(count, seed, epoch)
    assert sorted(epoch_order(count, seed, epoch)) == list(range(count))
    for step in micro[:-1]:
        assert [len(rows) for rows in step] == [batch_size] * accumulate
    assert all(rows for rows in micro[-1])
    assert all(len(rows) == batch_size for rows in micro[-1][:-1])


def test_the_order_is_pinned_and_changes_with_seed_and_epoch():
    # A change of this order would break every resumed run.
    assert epoch_order(8, 0, 0) == [5, 0, 3, 6, 4, 7, 2, 1]
    orders = {tuple(epoch_order(20, seed, epoch)) for seed in range(3) for epoch in range(3)}
    assert len(orders) == 9
    epoch_order(20, 0, 0).clear()
    assert len(epoch_order(20, 0, 0)) == 20


GROUPS = st.lists(st.integers(0, 5), min_size=1, max_size=40).map(tuple)


def epoch_batches(groups, batch_size, accumulate, seed=0, epoch=0):
    steps = steps_per_epoch(len(groups), batch_size, accumulate)
    return [
        step_rows(len(groups), batch_size, accumulate, seed, epoch * steps + step, groups)
        for step in range(steps)
    ]


@given(GROUPS, SIZES, SIZES, st.integers(0, 3), st.integers(0, 2))
def test_grouped_epochs_see_each_row_once_and_split_little(groups, batch_size, accumulate, seed, epoch):
    steps = epoch_batches(groups, batch_size, accumulate, seed, epoch)
    batches = [batch for step in steps for batch in step]
    assert sorted(row for batch in batches for row in batch) == list(range(len(groups)))
    assert all(len(batch) == batch_size for batch in batches[:-1])
    assert all(len(step) == accumulate for step in steps[:-1])
    # A batch splits one group at most, beside those that no batch could hold.
    met = sum(len({groups[row] for row in batch}) for batch in batches)
    needed = sum(-(-groups.count(group) // batch_size) for group in set(groups))
    assert met <= needed + len(batches)


@pytest.mark.parametrize("seed", range(5))
def test_groups_that_fit_are_not_split(seed):
    groups = (*range(8), *range(8), *range(8), *range(20, 28))  # eight groups of three rows, eight of one
    batches = [batch for (batch,) in epoch_batches(groups, 4, 1, seed)]
    assert len(batches) == 8
    for batch in batches:
        assert sorted(groups.count(groups[row]) for row in batch) == [1, 3, 3, 3]
        assert len({groups[row] for row in batch}) == 2


def test_the_grouped_order_is_pinned_and_changes_with_seed_and_epoch():
    # A change of this order would break every resumed run.
    groups = (0, 0, 0, 1, 1, 2, 2, 2, 2, 3)
    assert epoch_batches(groups, 4, 1) == [[[0, 2, 1, 9]], [[5, 7, 8, 6]], [[3, 4]]]
    orders = {
        str(epoch_batches(tuple(range(10)) * 2, 4, 1, seed, epoch)) for seed in range(3) for epoch in range(3)
    }
    assert len(orders) == 9


def test_groups_are_equal_prompts():
    prompt, other = list(range(8)), [*range(7), 99]

    def made(ids, loss_from, count=12):
        ids = [*ids, *range(50, 50 + count - len(ids))]
        return Encoded(0, ids, [index >= loss_from for index in range(count)])

    rows = [made(prompt, 8), made(other, 8), made([*prompt, 7], 8), made(prompt, 12), made(prompt, 9)]
    assert prompt_groups(rows) == (0, 1, 0, 2, 3)
    # Too little to share: each for itself, so that the order stays as random as it can be.
    assert prompt_groups([made(prompt, 7), made(prompt, 7), made(prompt, 0), made(prompt, 0)]) == (0, 1, 2, 3)
    assert prompt_groups([]) == ()


@given(encoded_rows())
def test_packed_and_padded_name_the_same_targets(rows):
    packed, padded = pack(rows), pad(rows, pad_id=-1)
    wanted = [row.ids[token] for row in rows for token in range(1, len(row.ids)) if row.loss[token]]
    assert targets(packed).ids.tolist() == targets(padded).ids.tolist() == wanted
    for batch in (packed, padded):
        found = targets(batch)
        # The predicting position holds the token before the target, in the same row.
        assert batch.ids[found.rows, found.columns].tolist() == [token - 1 for token in wanted]
        assert (batch.positions[found.rows, found.columns] >= 0).all()
        assert batch.lengths == tuple(len(row.ids) for row in rows)


@given(encoded_rows())
def test_packed_positions_restart(rows):
    batch = pack(rows)
    assert batch.packed
    assert batch.ids.shape == batch.positions.shape == batch.loss.shape == (1, sum(batch.lengths))
    assert batch.positions[0].tolist() == [token % 100 for token in batch.ids[0].tolist()]
    assert not batch.loss[batch.positions == 0].any()


def test_padding_is_on_the_right_and_carries_nothing():
    batch = pad([Encoded(1, [5], [True]), Encoded(2, [6, 7, 8], [False, True, True])], pad_id=9)
    assert batch.ids.tolist() == [[5, 9, 9], [6, 7, 8]]
    assert batch.positions.tolist() == [[0, 1, 2], [0, 1, 2]]
    assert batch.loss.tolist() == [[False] * 3, [False, True, True]]
    assert attention_mask(batch).tolist() == [[1, 0, 0], [1, 1, 1]]
    assert attention_mask(batch).dtype == batch.ids.dtype == torch.long
    with pytest.raises(ValueError, match="packed"):
        attention_mask(pack([Encoded(1, [5], [True])]))


def test_buckets_are_sorted_and_stable():
    assert bucketed([5, 1, 5, 2, 1], 2) == [[1, 4], [3, 0], [2]]
    assert bucketed([], 2) == []
