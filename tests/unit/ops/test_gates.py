"""Gated activations against their definition."""

import pytest
import torch

from onebase.ops.gates import ACTIVATIONS, Halves, gated, gated_backward
from onebase.ops.reference import GATES, gated_reference
from pairs import attached, draw


def halves(x):
    return Halves(*x.chunk(2, dim=-1))


def gradient_of(dz, x, activation):
    """The gradient of gate and up side by side; dz stays as it is."""
    out = torch.empty_like(x)
    gated_backward(dz.clone(), halves(x), activation, halves(out))
    return out


@pytest.mark.parametrize("activation", ACTIVATIONS)
@pytest.mark.parametrize("shape", [(1, 2), (5, 14), (3, 246)])
def test_values_and_gradients_are_the_references(activation, shape):
    x = draw(*shape)
    torch.testing.assert_close(gated(halves(x.detach()), activation), gated_reference(x, activation).detach())
    gradient = draw(shape[0], shape[1] // 2, seed=1).detach()
    expected = torch.autograd.grad(gated_reference(x, activation), x, gradient)[0]
    torch.testing.assert_close(gradient_of(gradient, x.detach(), activation), expected)


@pytest.mark.parametrize("activation", ACTIVATIONS)
def test_gradcheck(activation):
    pair = attached(
        lambda x: gated(halves(x), activation),
        lambda dz, x: [gradient_of(dz, x, activation)],
    )
    assert torch.autograd.gradcheck(pair, draw(3, 10))


def test_every_activation_has_its_reference():
    assert ACTIVATIONS.keys() == GATES.keys()


def test_the_first_half_is_the_gate():
    x = torch.tensor([[0.0, 100.0, 7.0, 5.0]])
    assert gated(halves(x), "silu").tolist() == [[0.0, 500.0]]


@pytest.mark.parametrize("activation", ACTIVATIONS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_as_exact_as_the_reference(activation, dtype):
    x = draw(33, 254, dtype=dtype).detach()
    truth = gated_reference(x.double(), activation)
    fast, plain = gated(halves(x), activation), gated_reference(x, activation)
    errors = [float((y.double() - truth).abs().max()) for y in (fast, plain)]
    assert errors[0] <= errors[1] + 1e-6
