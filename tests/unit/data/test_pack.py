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
