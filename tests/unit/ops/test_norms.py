"""RMS norm and layer norm against their reference, torch's own, and numbers by hand."""

import pytest
import torch
from torch.nn.functional import layer_norm, rms_norm

from onebase.ops.norms import Norm, norm, norm_backward, normed
from onebase.ops.reference import norm_reference
from pairs import attached, draw

SHAPES = [((7, 5), (5,)), ((3, 4, 9), (9,)), ((5, 3, 7), (3, 7)), ((1, 1), (1,)), ((507, 123), (123,))]


def test_by_hand():
    x = torch.tensor([[3.0, -4.0]])
    weight = torch.tensor([1.0, 2.0])
    rms = (12.5 + 0.5) ** 0.5
    expected = torch.tensor([[3 / rms, -8 / rms]])
    torch.testing.assert_close(norm(x, Norm(weight, 0.5)), expected)
    deviation = (12.25 + 0.5) ** 0.5
    expected = torch.tensor([[3.5 / deviation, -7 / deviation]])
    torch.testing.assert_close(norm(x, Norm(weight, 0.5, centred=True)), expected)


@pytest.mark.parametrize("centred", [False, True])
@pytest.mark.parametrize(("shape", "weight"), SHAPES)
def test_values_and_gradients_are_the_references(shape, weight, centred):
    x, spec = draw(*shape), Norm(draw(*weight, seed=1).detach(), 1e-3, centred)
    torch.testing.assert_close(norm(x, spec), norm_reference(x, spec))
    gradient = draw(*shape, seed=2).detach()
    expected = torch.autograd.grad(norm_reference(x, spec), x, gradient)[0]
    torch.testing.assert_close(norm_backward(gradient, x.detach(), spec), expected)
    if x.numel() < 200:
        assert torch.autograd.gradcheck(lambda t: normed(t, spec), x)
        pair = attached(lambda t: norm(t, spec), lambda dy, t: [norm_backward(dy, t, spec)])
        assert torch.autograd.gradcheck(pair, x)


def test_torch_has_the_same():
    x, weight = draw(4, 6).detach(), draw(6, seed=1).detach()
    torch.testing.assert_close(norm(x, Norm(weight, 1e-5)), rms_norm(x, (6,), weight, 1e-5))
    torch.testing.assert_close(norm(x, Norm(weight, 1e-5, True)), layer_norm(x, (6,), weight, None, 1e-5))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("centred", [False, True])
def test_as_exact_as_the_reference(dtype, centred):
    x = 30 * draw(33, 252, dtype=dtype).detach()
    spec = Norm(draw(252, seed=1, dtype=torch.float32).detach(), 1e-6, centred)
    truth = norm_reference(x.double(), spec._replace(weight=spec.weight.double()))
    fast, plain = norm(x, spec), norm_reference(x, spec)
    assert fast.dtype == dtype
    errors = [float((y.double() - truth).abs().max()) for y in (fast, plain)]
    assert errors[0] <= errors[1] + 1e-6


def test_the_input_is_not_written_to():
    x, spec = draw(3, 5).detach(), Norm(torch.ones(5, dtype=torch.float64), 1e-6)
    before = x.clone()
    norm_backward(norm(x, spec), x, spec)
    assert torch.equal(x, before)
