"""Linear layers with low-rank updates: values and gradients against each layer alone, dropout against its masks."""

import pytest
import torch

from onebase.ops.adapted import Dropout, Linear, Share, project, project_backward
from onebase.ops.lowrank import Factors
from onebase.ops.reference import project_reference
from pairs import attached, draw

# (in, outs, ranks; 0: no update, biases)
CASES = {
    "one": (5, [7], [2], [False]),
    "three with different ranks": (7, [9, 3, 3], [1, 4, 2], [True, False, True]),
    "some adapted": (5, [4, 6, 2], [0, 3, 0], [False, True, False]),
    "none adapted": (3, [4, 5], [0, 0], [True, False]),
    "narrow": (1, [1], [1], [False]),
}


def case(name, dtype=torch.float64, factor_dtype=None):
    """(x, layers, updates) with tensors that want gradients where the ops give some."""
    width, outs, ranks, biases = CASES[name]
    sizes = list(zip(outs, ranks, biases, strict=True))
    layers = [
        Linear(
            draw(out, width, seed=n, dtype=dtype).detach(),
            draw(out, seed=50 + n, dtype=dtype).detach() if bias else None,
        )
        for n, (out, _, bias) in enumerate(sizes)
    ]
    kind = factor_dtype or dtype
    updates = [
        Factors(draw(rank, width, seed=10 + n, dtype=kind), draw(out, rank, seed=20 + n, dtype=kind), 0.5 + n)
        if rank
        else None
        for n, (out, rank, _) in enumerate(sizes)
    ]
    return draw(11, width, dtype=dtype), layers, updates


def factors_of(updates):
    return [tensor for low in updates if low for tensor in (low.A, low.B)]


def rebuilt(updates, tensors):
    left = iter(tensors)
    return [low and Factors(next(left), next(left), low.scale) for low in updates]


def whole(updates, dropout=None):
    """One adapter for all rows."""
    return [Share(0, 11, updates, dropout)]


def parts(dy, layers):
    """What stands side by side as a contiguous tensor for each layer."""
    return [part.contiguous() for part in dy.split([len(layer.weight) for layer in layers], dim=1)]


def as_function(layers, updates, dropout=None):
    def forward(x, *tensors):
        return torch.cat(project(x, layers, whole(rebuilt(updates, tensors), dropout)).y, dim=1)

    def backward(dy, x, *tensors):
        shares = whole(rebuilt(updates, tensors), dropout)
        h = project(x, layers, shares).h
        found = project_backward(parts(dy, layers), (x, h), layers, shares, True)
        return [found.x, *found.factors]

    return attached(forward, backward)


@pytest.mark.parametrize("name", CASES)
def test_values_and_gradients_are_the_references(name):
    x, layers, updates = case(name)
    inputs = [x, *factors_of(updates)]
    ours, plain = as_function(layers, updates)(*inputs), project_reference(x, layers, updates)
    torch.testing.assert_close(ours, plain)
    gradient = draw(*plain.shape, seed=3).detach()
    one, other = (torch.autograd.grad(y, inputs, gradient) for y in (ours, plain))
    for found, expected in zip(one, other, strict=True):
        torch.testing.assert_close(found, expected)
    assert torch.autograd.gradcheck(as_function(layers, updates), inputs)


@torch.no_grad()
def test_the_input_gradient_is_left_out_where_not_wanted():
    x, layers, updates = case("three with different ranks")
    done = project(x.detach(), layers, whole(updates))
    dy = [torch.ones_like(y) for y in done.y]
    short = project_backward(dy, (x.detach(), done.h), layers, whole(updates), False)
    full = project_backward(dy, (x.detach(), done.h), layers, whole(updates), True)
    assert short.x is None
    assert len(short.factors) == 6
    assert all(torch.equal(a, b) for a, b in zip(short.factors, full.factors, strict=True))


@pytest.mark.parametrize("rate", [0.25, 0.6])
def test_dropout_is_its_masks(rate):
    x, layers, updates = case("three with different ranks")
    dropout = Dropout(rate, seed=7)
    inputs = [x, *factors_of(updates)]
    assert torch.autograd.gradcheck(as_function(layers, updates, dropout), inputs)
    expected = [
        x @ layer.weight.T
        + (0 if layer.bias is None else layer.bias)
        + low.scale * (x * dropout.mask(x, n) @ low.A.T) @ low.B.T
        for n, (layer, low) in enumerate(zip(layers, updates, strict=True))
    ]
    with torch.no_grad():
        torch.testing.assert_close(project(x, layers, whole(updates, dropout)).y, expected)


def test_each_share_has_its_rows_and_the_others_none():
    """Two adapters of other ranks and targets, and rows of neither, against each stretch of rows alone."""
    x, layers, updates = case("three with different ranks")
    other = [None, case("some adapted")[2][1]._replace(A=draw(5, 7, seed=40), B=draw(3, 5, seed=41)), None]
    shares = [Share(0, 4, updates), Share(6, 11, other, Dropout(0.3, 9))]
    spans = [(0, 4, updates, None), (4, 6, [None] * 3, None), (6, 11, other, shares[1].dropout)]
    gradient = draw(11, 15, seed=3).detach()
    with torch.no_grad():
        done = project(x, layers, shares)
        found = project_backward(parts(gradient, layers), (x, done.h), layers, shares, True)
        alone = []
        for start, stop, lows, dropout in spans:
            own = [Share(0, stop - start, lows, dropout)]
            part = project(x[start:stop], layers, own)
            dy = parts(gradient[start:stop], layers)
            back = project_backward(dy, (x[start:stop], part.h), layers, own, True)
            alone.append((part.y, back))
    for number, y in enumerate(done.y):
        torch.testing.assert_close(y, torch.cat([own[number] for own, _ in alone]), rtol=1e-12, atol=1e-12)
    torch.testing.assert_close(found.x, torch.cat([back.x for _, back in alone]), rtol=1e-12, atol=1e-12)
    expected = [factor for _, back in alone for factor in back.factors]
    assert len(expected) == len(found.factors) == 8
    for one, two in zip(found.factors, expected, strict=True):
        torch.testing.assert_close(one, two, rtol=1e-12, atol=1e-12)


def test_masks_keep_the_mean_and_differ():
    like = torch.zeros(200, 300)
    first, second = (Dropout(0.3, 1).mask(like, number) for number in (0, 1))
    assert first.unique().tolist() == pytest.approx([0, 1 / 0.7])
    assert float(first.mean()) == pytest.approx(1, abs=0.02)
    assert float((first != second).float().mean()) == pytest.approx(2 * 0.3 * 0.7, abs=0.02)
    assert torch.equal(first, Dropout(0.3, 1).mask(like, 0))


def test_masks_leave_torchs_random_state_alone():
    state = torch.get_rng_state()
    Dropout(0.3, 1).mask(torch.zeros(3), 0)
    assert torch.equal(torch.get_rng_state(), state)


def test_a_narrow_base_with_wide_factors():
    """As under torch's autocast: products in the base's dtype, the factors' gradients in the factors' own."""
    x, layers, updates = case("three with different ranks", torch.bfloat16, torch.float32)
    inputs = [x, *factors_of(updates)]
    gradient = draw(11, 15, seed=3, dtype=torch.bfloat16).detach()
    with torch.autocast("cpu", torch.bfloat16):
        plain = project_reference(x, layers, updates)
    theirs = torch.autograd.grad(plain, inputs, gradient)
    with torch.no_grad():
        done = project(x, layers, whole(updates))
        found = project_backward(parts(gradient, layers), (x, done.h), layers, whole(updates), True)
    assert {tensor.dtype for tensor in (*done.y, found.x)} == {torch.bfloat16}
    assert {gradient.dtype for gradient in found.factors} == {torch.float32}
    wide = [low._replace(A=low.A.double(), B=low.B.double()) for low in updates]
    exact_layers = [Linear(*(t if t is None else t.double() for t in layer)) for layer in layers]
    exact = project_reference(x.double(), exact_layers, wide)
    truth = torch.autograd.grad(exact, inputs, gradient.double())
    ours = (torch.cat(done.y, dim=1), found.x, *found.factors)
    for one, peer, expected in zip(ours, (plain, *theirs), (exact, *truth), strict=True):
        mine, other = (
            float((t.detach().double() - expected.detach()).norm() / expected.detach().norm())
            for t in (one, peer)
        )
        assert mine <= max(1.2 * other, 2**-7)  # a few roundings of 2^-9 each
