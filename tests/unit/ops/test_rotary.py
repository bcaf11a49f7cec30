"""Rotary embedding against rotation matrices, and its inverse."""

import pytest
import torch

from onebase.ops.reference import rotate_reference
from onebase.ops.rotary import Rotation, rotate_
from pairs import attached, draw


def rotation(tokens, pairs, interleaved=False):
    angles = torch.arange(tokens, dtype=torch.float64)[:, None] * torch.linspace(
        1, 0.1, pairs, dtype=torch.float64
    )
    return Rotation(1.3 * angles.cos(), 1.3 * angles.sin(), interleaved)  # 1.3: YaRN scales its angles


def turned(x, spec):
    return rotate_(x.clone(), spec)


@pytest.mark.parametrize("interleaved", [False, True])
@pytest.mark.parametrize(("shape", "pairs"), [((5, 3, 8), 4), ((7, 1, 2, 10), 3), ((1, 2), 1)])
def test_values_and_gradients_are_the_references(shape, pairs, interleaved):
    x, spec = draw(*shape), rotation(shape[0], pairs, interleaved)
    torch.testing.assert_close(turned(x.detach(), spec), rotate_reference(x, spec).detach())
    gradient = draw(*shape, seed=1).detach()
    expected = torch.autograd.grad(rotate_reference(x, spec), x, gradient)[0]
    torch.testing.assert_close(turned(gradient, spec.inverse), expected)
    pair = attached(lambda t: turned(t, spec), lambda dy, t: [turned(dy, spec.inverse)])
    assert torch.autograd.gradcheck(pair, x)


def test_by_hand():
    quarter = Rotation(torch.zeros(1, 2), torch.ones(1, 2))
    x = torch.tensor([[1.0, 2.0, 3.0, 4.0, 5.0]])
    assert turned(x, quarter).tolist() == [[-3.0, -4.0, 1.0, 2.0, 5.0]]
    assert turned(x, quarter._replace(interleaved=True)).tolist() == [[-2.0, 1.0, -4.0, 3.0, 5.0]]


def test_any_strides_are_turned():
    x, spec = draw(4, 3, 6).detach(), rotation(4, 2)
    out = x.transpose(0, 1).contiguous()
    rotate_(out.transpose(0, 1), spec)
    torch.testing.assert_close(out.transpose(0, 1), turned(x, spec))


def test_only_the_distance_counts():
    """q at position i and k at position j score by i - j: what makes it a position embedding."""
    q, k = draw(6, 8).detach()[:1].expand(6, 8), draw(6, 8, seed=3).detach()[:1].expand(6, 8)
    scores = turned(q.contiguous(), rotation(6, 4)) @ turned(k.contiguous(), rotation(6, 4)).T
    for distance in range(-5, 6):
        diagonal = scores.diagonal(distance)
        torch.testing.assert_close(diagonal, diagonal[:1].expand_as(diagonal))
