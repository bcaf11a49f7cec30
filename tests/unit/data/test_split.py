"""The held-out rows: seeded, whole groups, order kept, never everything."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from onebase.data.read import Example
from onebase.data.split import split_examples
from onebase.errors import ConfigError, DataError


def examples(groups: str) -> list[Example]:
    return [Example(row, text="x", group=group) for row, group in enumerate(groups, 1)]


@pytest.mark.parametrize(("holdout", "held"), [(0, 0), (0.1, 2), (0.01, 1), (1, 1), (5, 5), (0.5, 10)])
def test_fraction_or_count(holdout, held):
    train, validation = split_examples(examples("a" * 20), holdout, False, seed=0)
    assert (len(train), len(validation)) == (20 - held, held)


@given(st.text("abcdef", min_size=2, max_size=40), st.integers(0, 9), st.sampled_from([0.2, 0.5, 1, 2]))
def test_groups_stay_together_and_order_is_kept(groups, seed, holdout):
    rows = examples(groups)
    distinct = len(set(groups))
    count = holdout if holdout >= 1 else max(1, round(distinct * holdout))
    if count >= distinct:
        with pytest.raises(DataError, match="groups to train on"):
            split_examples(rows, holdout, True, seed)
        return
    train, validation = split_examples(rows, holdout, True, seed)
    assert len({row.group for row in validation}) == count
    assert not {row.group for row in train} & {row.group for row in validation}
    assert sorted(train + validation, key=lambda row: row.row) == rows
    for side in (train, validation):
        assert side == sorted(side, key=lambda row: row.row)


def test_the_seed_decides():
    rows = examples("a" * 50)
    assert split_examples(rows, 5, False, 1) == split_examples(rows, 5, False, 1)
    assert split_examples(rows, 5, False, 1) != split_examples(rows, 5, False, 2)


def test_a_split_that_leaves_nothing_is_an_error():
    for holdout in (3, 0.99):
        with pytest.raises(DataError, match="leaves none of 3 rows"):
            split_examples(examples("abc"), holdout, False, 0)
    with pytest.raises(ConfigError, match="whole number"):
        split_examples(examples("abc"), 1.5, False, 0)
