"""Comparing adapters: the numbers of the changes W' - W as matrices, for different ranks, targets and variants."""

from dataclasses import replace

import pytest

from onebase.adapters.kinds import merged_weight
from onebase.config import LoraConfig
from onebase.diagnosis.comparison import compare, summary
from sickness import adapter
from texts import text_model

PATH = "model.layers.1.self_attn.v_proj"


def matrices(model, *adapters, path=PATH):
    weight = model.get_submodule(path).weight.detach().double()
    return [merged_weight(weight, a.lowrank[path]) - weight for a in adapters]


def angle(a, b):
    return float((a * b).sum() / (a.norm() * b.norm()))


def two(model, **more):
    first = adapter(model, LoraConfig(rank=4, alpha=8, **more))
    other = adapter(model, LoraConfig(rank=2, alpha=1, target_modules=["q_proj", "v_proj"], **more))
    low = {  # a part of the first one's direction, so that the cosine is not that of chance
        p: o._replace(A=o.A + first.lowrank[p].A[:2], B=o.B + first.lowrank[p].B[:, :2])
        for p, o in other.lowrank.items()
    }
    return first, replace(other, lowrank=low)


def test_ranks_and_targets_may_differ():
    model = text_model()
    first, other = two(model)
    pairs = {pair.path: pair for pair in compare(first, other)}
    assert list(pairs) == list(first.lowrank)
    a, b = matrices(model, first, other)
    pair = pairs[PATH]
    assert pair.ranks == (4, 2)
    assert pair.norms == pytest.approx((float(a.norm()), float(b.norm())))
    assert pair.cosine == pytest.approx(angle(a, b), abs=1e-6)
    assert pair.cosine > 0.2
    alone = pairs["model.layers.0.mlp.up_proj"]
    assert (alone.ranks, alone.norms[1], alone.cosine, alone.note) == ((4, 0), 0.0, None, "only in the first")


def test_the_summary_is_of_all_shared_modules_as_one_vector():
    model = text_model()
    first, other = two(model)
    whole = summary(compare(first, other))
    products = [matrices(model, first, other, path=path) for path in other.lowrank]
    dot = sum(float((a * b).sum()) for a, b in products)
    sizes = [sum(float(pair[n].norm()) ** 2 for pair in products) ** 0.5 for n in (0, 1)]
    assert whole.cosine == pytest.approx(dot / (sizes[0] * sizes[1]), abs=1e-6)
    assert (whole.shared, whole.alone) == (4, (10, 0))
    assert whole.norms[1] == pytest.approx(sizes[1])
    assert summary(compare(first, first)).cosine == pytest.approx(1.0)
    assert summary(compare(other, first)).alone == (0, 10)


def test_dora_needs_the_weights():
    model = text_model()
    first, other = two(model, dora=True)
    pair = next(p for p in compare(first, other) if p.path == PATH)
    assert (pair.cosine, pair.norms) == (None, (None, None))
    assert pair.overlap is not None
    found = compare(first, other, lambda path: model.get_submodule(path).weight.detach())
    pair = next(p for p in found if p.path == PATH)
    a, b = matrices(model, first, other)
    assert pair.cosine == pytest.approx(angle(a, b), abs=1e-5)
    assert pair.norms[0] == pytest.approx(float(a.norm()), rel=1e-5)


def test_updates_of_other_shapes_are_not_compared():
    first, other = adapter(), adapter(text_model(hidden_size=64))
    pairs = compare(first, other)
    assert {pair.note for pair in pairs} == {"the updates have different shapes: another base"}
    assert summary(pairs).cosine is None
