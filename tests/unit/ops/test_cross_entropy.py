"""The loss under a frozen head, in chunks, against all logits at once."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.nn.functional import cross_entropy

from onebase.ops.cross_entropy import Head, frozen_cross_entropy
from onebase.ops.reference import cross_entropy_reference
from pairs import draw
from watching import Largest

HEADS = {
    "plain": {},
    "scaled": {"scale": 0.3},
    "capped": {"softcap": 2.0},
    "both": {"scale": 1.7, "softcap": 0.9},
}


def case(rows, width, vocabulary, targets, bias=False, seed=0, **options):
    hidden = draw(rows, width, seed=seed)
    head = Head(
        draw(vocabulary, width, seed=1).detach(), draw(vocabulary).detach() if bias else None, **options
    )
    generator = torch.Generator().manual_seed(seed)
    places = torch.randint(rows, (targets,), generator=generator)
    return hidden, head, places, torch.randint(vocabulary, (targets,), generator=generator)


@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize("options", HEADS.values(), ids=HEADS)
def test_values_and_gradients_are_the_references(options, bias):
    hidden, head, rows, ids = case(13, 5, 33, 29, bias, **options)
    fast, plain = (
        frozen_cross_entropy(hidden, head, rows, ids, chunk=4),
        cross_entropy_reference(hidden, head, rows, ids),
    )
    torch.testing.assert_close(fast, plain, rtol=1e-12, atol=0)
    torch.testing.assert_close(*(torch.autograd.grad(3 * loss, hidden)[0] for loss in (fast, plain)))
    assert torch.autograd.gradcheck(lambda h: frozen_cross_entropy(h, head, rows, ids, chunk=4), hidden)


def test_the_reference_is_torchs_cross_entropy():
    hidden, head, rows, ids = case(6, 5, 11, 9)
    expected = cross_entropy((hidden @ head.weight.T)[rows], ids, reduction="sum")
    torch.testing.assert_close(cross_entropy_reference(hidden, head, rows, ids), expected)


@settings(max_examples=60)
@given(rows=st.integers(1, 20), targets=st.integers(0, 30), chunk=st.integers(1, 25), seed=st.integers(0, 99))
def test_any_chunks_and_repeated_targets(rows, targets, chunk, seed):
    hidden, head, places, ids = case(rows, 3, 7, targets, seed=seed)
    fast = frozen_cross_entropy(hidden, head, places, ids, chunk)
    plain = cross_entropy_reference(hidden, head, places, ids)
    torch.testing.assert_close(fast, plain)
    torch.testing.assert_close(*(torch.autograd.grad(loss, hidden)[0] for loss in (fast, plain)))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_as_exact_as_the_reference(dtype):
    hidden, head, rows, ids = case(123, 16, 252, 150)
    low_hidden, low_head = hidden.to(dtype), head._replace(weight=head.weight.to(dtype))
    exact = [x.double() for x in (low_hidden, low_head.weight)]
    truth = cross_entropy_reference(exact[0], Head(exact[1]), rows, ids)
    fast = frozen_cross_entropy(low_hidden, low_head, rows, ids)
    plain = cross_entropy_reference(low_hidden, low_head, rows, ids)
    assert fast.dtype == torch.float32
    assert abs(fast.double() - truth) <= abs(plain.double() - truth) + 1e-5 * truth


def test_large_logits_do_not_overflow():
    hidden, head = torch.tensor([[1000.0], [-1000.0]]), Head(torch.tensor([[1.0], [-1.0]]))
    loss = frozen_cross_entropy(hidden, head, torch.tensor([0, 1]), torch.tensor([0, 0]))
    assert float(loss) == 2000.0


def test_the_head_gets_no_gradient_and_no_graph_none():
    hidden, head, rows, ids = case(4, 3, 7, 5)
    weight = head.weight.clone().requires_grad_()
    frozen_cross_entropy(hidden, Head(weight), rows, ids).backward()
    assert weight.grad is None
    assert hidden.grad is not None
    assert not frozen_cross_entropy(hidden.detach(), Head(weight), rows, ids).requires_grad


def test_the_logits_never_exist_whole():
    hidden, head, rows, ids = case(96, 4, 50, 200)
    with Largest() as largest:
        frozen_cross_entropy(hidden, head, rows, ids, chunk=16)
    assert largest.size == 16 * 50 < 96 * 50
