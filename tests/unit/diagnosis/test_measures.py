"""Measures of updates against their definitions on full matrices, in float64."""

import math

import pytest
import torch
from torch import nn

from onebase.adapters.adapter import LowRank, joined
from onebase.adapters.kinds import merged_weight
from onebase.diagnosis.measures import (
    change,
    cosine,
    directions,
    divergence,
    held,
    inner,
    intruders,
    overlap,
    share,
    spectrum,
)
from onebase.ops.lowrank import update


def low(rank=3, out=7, features=5, seed=0, **more):
    generator = torch.Generator().manual_seed(seed)
    blocks = more.get("blocks", 1)
    a = torch.randn(blocks * rank, features, generator=generator)
    return LowRank(a, torch.randn(blocks * out, rank, generator=generator), more.pop("scale", 0.5), **more)


def full(one):
    return update(one.factors._replace(A=one.A.double(), B=one.B.double()))


@pytest.mark.parametrize("blocks", [1, 4])
@pytest.mark.parametrize("rank", [1, 3, 9])  # 9: more ranks than the matrix can have
@pytest.mark.parametrize("scale", [0.5, -2.0])
def test_directions_are_the_singular_value_decomposition(blocks, rank, scale):
    one = low(rank, blocks=blocks, scale=scale)
    found = directions(one)
    matrix = full(one).unflatten(0, (blocks, -1))
    torch.testing.assert_close(found.left @ torch.diag_embed(found.values) @ found.right.mT, matrix)
    expected = torch.linalg.svdvals(matrix)
    torch.testing.assert_close(found.values, expected[:, : found.values.shape[1]])
    size = spectrum(one)
    assert size.norm == pytest.approx(float(matrix.norm()))
    ranks = [float(s.square().sum() / s[0] ** 2) for s in expected]
    assert size.stable_rank == pytest.approx(sum(ranks) / blocks)
    assert size.top_share == pytest.approx(float((expected[:, 0] ** 2).sum() / (expected**2).sum()))


def test_an_update_whose_halves_cancel_is_nothing():
    one = low()
    assert spectrum(joined(one, one._replace(B=-one.B))) == (0.0, 0.0, 0.0)
    assert spectrum(one._replace(B=torch.zeros_like(one.B))).norm == 0.0
    assert spectrum(one._replace(B=one.B * 1e-20)).norm > 0.0  # small is not nothing


@pytest.mark.parametrize("blocks", [1, 4])
def test_inner_product_and_cosine_are_those_of_the_matrices(blocks):
    one, other = low(3, seed=1, blocks=blocks, scale=2.0), low(2, seed=2, blocks=blocks, scale=-0.3)
    product = float((full(one) * full(other)).sum())
    assert inner(one, other) == pytest.approx(product)
    assert cosine(one, other) == pytest.approx(product / float(full(one).norm() * full(other).norm()))
    assert cosine(one, one) == pytest.approx(1.0)
    assert cosine(one, one._replace(B=-one.B)) == pytest.approx(-1.0)
    assert cosine(one, one._replace(A=torch.zeros_like(one.A))) is None


def test_overlap_is_of_the_subspaces_and_not_of_their_bases():
    one = low(2, out=9, features=8, seed=3)
    mixed = torch.tensor([[2.0, 1.0], [-1.0, 3.0]])
    same = one._replace(A=mixed @ one.A, B=low(2, out=9, features=8, seed=4).B)
    found = overlap(one, same)
    assert found.inputs == pytest.approx(1.0)
    q = [torch.linalg.qr(x.B.double()).Q for x in (one, same)]
    assert found.outputs == pytest.approx(float((q[0].T @ q[1]).square().sum() / 2))
    larger = joined(one, low(3, out=9, features=8, seed=5)._replace(scale=0.5))
    assert overlap(one, larger).inputs == pytest.approx(1.0)  # nested, of ranks 2 and 5
    apart = [LowRank(torch.eye(4)[n : n + 2], torch.eye(4)[:, n : n + 2], 1.0) for n in (0, 2)]
    assert overlap(*apart)[:2] == (0.0, 0.0)
    assert overlap(*apart).chance_inputs == 0.5
    assert overlap(one, one._replace(B=torch.zeros_like(one.B))) is None


def test_chance_is_what_random_subspaces_share():
    pairs = [(low(3, 40, 30, seed), low(5, 40, 30, seed + 1000)) for seed in range(60)]
    found = [overlap(*pair) for pair in pairs]
    assert sum(f.inputs for f in found) / 60 == pytest.approx(found[0].chance_inputs, rel=0.1)
    assert sum(f.outputs for f in found) / 60 == pytest.approx(found[0].chance_outputs, rel=0.1)
    assert found[0].chance_inputs == pytest.approx(5 / 30)


@pytest.mark.parametrize("kind", ["linear", "transposed"])
@pytest.mark.parametrize("magnitude", [False, True])
def test_change_is_what_merging_does(kind, magnitude):
    one = low(kind=kind, magnitude=torch.rand(7) + 0.5 if magnitude else None)
    weight = torch.randn((5, 7) if kind == "transposed" else (7, 5))
    expected = merged_weight(weight, one) - weight
    torch.testing.assert_close(change(weight, one), expected.T if kind == "transposed" else expected)


def test_intruders_are_the_directions_that_the_weight_lacks():
    generator = torch.Generator().manual_seed(0)
    u = torch.linalg.qr(torch.randn(20, 20, generator=generator)).Q
    v = torch.linalg.qr(torch.randn(30, 20, generator=generator)).Q
    weight = u @ torch.diag(torch.linspace(20, 1, 20)) @ v.T
    mixed = u.sum(1, keepdim=True) / math.sqrt(20)  # cosine 0.22 with each singular vector of the weight
    new = LowRank(v[:, :1].T * 1.0, mixed * 200, 1.0)
    assert intruders(weight, new) == (1, 10)
    old = LowRank(v[:, 3:4].T * 1.0, u[:, 3:4] * 200, 1.0)  # one that is there already, made larger
    assert intruders(weight, old) == (0, 10)
    assert intruders(weight, new._replace(B=torch.zeros_like(new.B))) == (0, 10)


def test_held_tells_whether_a_weight_holds_the_update():
    generator = torch.Generator().manual_seed(0)
    lows = [low(4, 50, 60, seed) for seed in range(8)]
    weights = [torch.randn(50, 60, generator=generator) * 4 for _ in lows]
    amount, spread = held([share(w, one) for w, one in zip(weights, lows, strict=True)])
    assert abs(amount) < 4 * spread < 0.5
    both = zip(weights, lows, strict=True)
    amount, after = held([share(merged_weight(w, one), one) for w, one in both])
    assert abs(amount - 1) < 4 * spread
    assert after == pytest.approx(spread, rel=1e-3)  # a merge leaves the noise as it was
    assert held([share(weights[0], low(1, 50, 60))])[1] == math.inf  # nothing to tell the noise from


def test_the_stated_deviation_is_that_of_many_draws():
    one = low(4, 30, 20, seed=1)
    found = [
        held([share(torch.randn(30, 20, generator=torch.Generator().manual_seed(n)), one)])
        for n in range(300)
    ]
    amounts = torch.tensor([amount for amount, _ in found])
    spread = torch.tensor([spread for _, spread in found]).square().mean().sqrt()
    assert float(amounts.std() / spread) == pytest.approx(1.0, abs=0.15)
    assert abs(float(amounts.mean())) < 0.2 * float(spread)


def test_divergence_is_the_definition():
    p, q = torch.randn(5, 11), torch.randn(5, 11)
    expected = nn.functional.kl_div(
        q.double().log_softmax(1), p.double().log_softmax(1), log_target=True, reduction="none"
    )
    torch.testing.assert_close(divergence(p, q), expected.sum(1))
    assert divergence(p, p).tolist() == [0.0] * 5
    p[:, 3] = -math.inf  # what cannot come takes no part
    assert divergence(p, q).isfinite().all()
    wider = torch.cat([q, torch.randn(5, 2)], 1)
    torch.testing.assert_close(divergence(p, wider), divergence(p, q))  # over what both know
