"""Many adapters in one product: against each row's own update, and how a batch is cut into products."""

import pytest
import torch

from onebase.ops.grouped import Row, Segment, add_updates, fill, new_place, segments
from onebase.ops.lowrank import Factors, lowrank

FEATURES, OUTS, SLOTS = 7, (5, 3), 5


def some(rank, seed):
    draw = torch.Generator().manual_seed(seed)

    def one(out):
        return Factors(
            torch.randn(rank, FEATURES, generator=draw), torch.randn(out, rank, generator=draw), 0.5 * seed
        )

    return [one(out) for out in OUTS]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_each_row_gets_its_own_slots_update(dtype):
    place = new_place(SLOTS, 4, FEATURES, OUTS, torch.device("cpu"))
    for tensor in (place.A, *place.B):
        tensor.fill_(torch.nan)  # a slot holds anything before it is filled
    lows = {slot: some(1 + slot % 4, slot + 1) for slot in range(SLOTS)}
    lows[2][0] = None  # an adapter without an update of the first layer
    for slot in reversed(range(SLOTS)):
        fill(place, slot, some(4, 9))  # what was there before is gone
        fill(place, slot, lows[slot])
    slots = [0, 0, 0, 1, 2, 3, 4, 4]
    parts = [Segment(0, 3, 0), Segment(3, 6, 1, each=True), Segment(6, 7, 4)]  # the last row has none
    x = torch.randn(8, FEATURES).to(dtype)
    y = torch.randn(8, sum(OUTS)).to(dtype)
    wanted = y.float().clone()
    for row, slot in enumerate(slots[:7]):
        for low, part in zip(lows[slot], wanted.split(OUTS, dim=1), strict=True):
            if low is not None:
                part[row] += lowrank(x[row], low)
    add_updates(x, y.split(OUTS, dim=1), place, parts)
    torch.testing.assert_close(y, wanted.to(dtype), atol=1e-5, rtol=1e-5 if dtype == torch.float32 else 1e-2)


@pytest.mark.parametrize(
    ("rows", "wanted"),
    [
        ([(1, 0, None), (4, 1, None)], []),
        ([(1, 0, "a"), (1, 1, "b"), (1, 2, "c")], [Segment(0, 3, 0, True)]),
        ([(1, 0, "a"), (1, 1, "a"), (5, 3, "a")], [Segment(0, 7, 0)]),
        ([(1, 0, "a"), (1, 2, "b")], [Segment(0, 1, 0), Segment(1, 2, 2)]),
        ([(1, 0, "a"), (1, 1, None), (1, 2, "b"), (1, 3, "c")], [Segment(0, 1, 0), Segment(2, 4, 2, True)]),
        ([(1, 0, "a"), (1, 1, "a"), (1, 2, "b")], [Segment(0, 2, 0), Segment(2, 3, 2)]),
        ([(1, 0, "a"), (1, 1, "b"), (1, 2, "b"), (3, 3, "b")], [Segment(0, 3, 0, True), Segment(3, 6, 3)]),
        ([(2, 0, "a"), (1, 1, "b")], [Segment(0, 2, 0), Segment(2, 3, 1)]),
    ],
)
def test_a_batch_is_cut_into_few_products(rows, wanted):
    assert segments([Row(*row) for row in rows]) == wanted
