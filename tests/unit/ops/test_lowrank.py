"""W + s·B·A: the update's product, its place in the output, and its gradients."""

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn
from torch.autograd import gradcheck

from onebase.adapters.adapter import LowRank
from onebase.adapters.kinds import KINDS, kind_of, merged_weight
from onebase.ops.lowrank import Factors, effective_weight, lowrank, lowrank_rows


def test_effective_weight_by_hand():
    weight = torch.tensor([[1.0, 2.0], [3.0, 4.0], [5.0, 6.0]])
    a, b = torch.tensor([[1.0, -1.0]]), torch.tensor([[2.0], [0.0], [1.0]])
    expected = torch.tensor([[2.0, 1.0], [3.0, 4.0], [5.5, 5.5]])
    assert torch.equal(effective_weight(weight, Factors(a, b, 0.5)), expected)


def test_effective_weight_is_cast_once():
    weight = torch.tensor([[1.0]], dtype=torch.bfloat16)
    a, b = torch.full((4, 1), 0.001), torch.ones(1, 4)
    # 1 + 0.004 rounds to the next bfloat16 above 1 only if the four terms are summed before the cast
    assert effective_weight(weight, Factors(a, b, 1.0)).item() == 1.0078125
    assert effective_weight(weight, Factors(a, b, 0.5)).item() == 1.0


@settings(max_examples=50)
@given(st.tuples(*[st.integers(1, 13)] * 4), st.floats(-3, 3), st.integers(0, 99))
def test_product_equals_effective_weight(sizes, scale, seed):
    rows, features, out, rank = sizes
    generator = torch.Generator().manual_seed(seed)

    def draw(*shape):
        return torch.randn(shape, generator=generator, dtype=torch.float64)

    x, weight, a, b = draw(rows, features), draw(out, features), draw(rank, features), draw(out, rank)
    whole = x @ effective_weight(weight, Factors(a, b, scale)).T
    torch.testing.assert_close(x @ weight.T + lowrank(x, Factors(a, b, scale)), whole)


def test_embedding_product_equals_effective_weight():
    ids, weight = torch.tensor([[3, 0], [6, 3]]), torch.randn(7, 5, dtype=torch.float64)
    a, b = torch.randn(2, 7, dtype=torch.float64), torch.randn(5, 2, dtype=torch.float64)
    whole = effective_weight(weight.T, Factors(a, b, 0.7)).T[ids]
    torch.testing.assert_close(weight[ids] + lowrank_rows(ids, Factors(a, b, 0.7)), whole)


def test_gradients():
    x = torch.randn(3, 5, dtype=torch.float64, requires_grad=True)
    a = torch.randn(2, 5, dtype=torch.float64, requires_grad=True)
    b = torch.randn(4, 2, dtype=torch.float64, requires_grad=True)
    assert gradcheck(lambda x, a, b: lowrank(x, Factors(a, b, 1.7)), (x, a, b))
    ids = torch.tensor([0, 4, 4])
    assert gradcheck(lambda a, b: lowrank_rows(ids, Factors(a, b, 1.7)), (a, b))


def test_kinds_know_shapes_and_orientation():
    low = LowRank(torch.randn(2, 5), torch.randn(3, 2), 0.5)
    linear, embedding = nn.Linear(5, 3), nn.Embedding(5, 3)
    assert kind_of(linear) == "linear"
    assert kind_of(embedding) == "embedding"
    assert kind_of(nn.LayerNorm(5)) is None
    assert KINDS["linear"].shape(linear) == KINDS["embedding"].shape(embedding) == (5, 3)
    torch.testing.assert_close(merged_weight(linear.weight, low), linear.weight + 0.5 * low.B @ low.A)
    merged = merged_weight(embedding.weight, low._replace(kind="embedding"))
    torch.testing.assert_close(merged, embedding.weight + 0.5 * (low.B @ low.A).T)


@pytest.mark.parametrize("scale", [1e300, -1e300])
def test_a_scale_beyond_float32_is_infinite_and_no_crash(scale):
    found = effective_weight(torch.ones(2, 3), Factors(torch.ones(1, 3), torch.ones(2, 1), scale))
    assert torch.equal(found, torch.full((2, 3), math.copysign(math.inf, scale)))
