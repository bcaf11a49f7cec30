"""One step: its loss and gradient belong to the rows, not to how they are cut into batches."""

import math
import random
from types import SimpleNamespace

import pytest
import torch
from torch import nn

from adapters import trained
from onebase.adapters.injection import inject, new_adapter, trainable, use
from onebase.config import LoraConfig
from onebase.data.template import Encoded
from onebase.errors import Diverged, TargetError
from onebase.models.scoring import packed_loss, padded_loss
from onebase.training.step import check_used, gradients, train_step
from tiny import tiny


def some_rows(count=8, seed=0):
    chance = random.Random(seed)
    rows = []
    for number in range(count):
        length = chance.randint(3, 12)
        loss = [False] + [chance.random() < 0.6 for _ in range(length - 2)] + [True]
        rows.append(Encoded(number + 1, [chance.randint(3, 95) for _ in range(length)], loss))
    return rows


def prepared(arch="llama"):
    """A model in float64 with a trained adapter on it, and its parameters, ready for gradients."""
    model = tiny(arch)
    inject(model, trained(model, LoraConfig(rank=4, alpha=8))).double()
    parameters = trainable(model, "default")
    for parameter in parameters.values():
        parameter.requires_grad_(True)
    return model, parameters


def cut(rows, size):
    return [rows[start : start + size] for start in range(0, len(rows), size)]


def padded(model):
    return padded_loss(model, 0)


def measured(batches, arch="llama", way=padded):
    model, parameters = prepared(arch)
    with use(model):
        loss, count = gradients(way(model), batches)
    return loss, count, {name: parameter.grad for name, parameter in parameters.items()}


def assert_same(found, expected, tolerance):
    assert found[0] == pytest.approx(expected[0], rel=tolerance)
    assert found[1] == expected[1]
    for name, gradient in expected[2].items():
        scale = float(gradient.abs().max())
        assert float((found[2][name] - gradient).abs().max()) <= tolerance * max(scale, 1e-3), name


@pytest.mark.parametrize("size", [1, 2, 3, 4])
def test_micro_batches_change_nothing(size):
    rows = some_rows()
    assert_same(measured(cut(rows, size)), measured(cut(rows, 8)), 1e-6)


@pytest.mark.parametrize("arch", ["llama", "gpt2", "gemma3"])
@pytest.mark.parametrize("size", [3, 8])
def test_packed_equals_padded(arch, size):
    rows = some_rows(seed=1)
    assert_same(measured(cut(rows, size), arch, packed_loss), measured(cut(rows, 8), arch), 1e-5)


def row_losses(rows):
    """(summed loss, targets) of each row alone, from the plain logits."""
    model, _ = prepared()
    found = []
    for row in rows:
        with torch.no_grad(), use(model):
            logs = model(input_ids=torch.tensor([row.ids])).logits[0].log_softmax(-1)
        wanted = [(i - 1, row.ids[i]) for i in range(1, len(row.ids)) if row.loss[i]]
        found.append((-float(sum(logs[place, token] for place, token in wanted)), len(wanted)))
    return found


def test_every_token_weighs_the_same():
    """One row with a single target, one with ten: the mean of the batches' means would be another number."""
    rows = [
        Encoded(1, [5, 6, 7], [False, False, True]),
        Encoded(2, list(range(20, 31)), [False] + [True] * 10),
    ]
    sums = row_losses(rows)
    tokenwise = sum(total for total, _ in sums) / 11
    batchwise = sum(total / count for total, count in sums) / 2
    assert abs(tokenwise - batchwise) > 0.1
    loss, count, _ = measured(cut(rows, 1))
    assert (loss, count) == (pytest.approx(tokenwise, rel=1e-5), 11)


def test_a_batch_without_a_target_adds_nothing():
    rows = [*some_rows(4), Encoded(9, [5, 6, 7, 8], [False] * 4)]
    found, expected = measured(cut(rows, 1)), measured(cut(rows[:4], 1))
    assert_same(found, expected, 1e-6)
    assert all(bool(gradient.isfinite().all()) for gradient in found[2].values())


@pytest.mark.parametrize("clip", [0.0, 0.05, 1e6])
def test_clipping(clip):
    """Plain gradient descent with rate 1 moves by exactly the clipped gradient."""
    batches = cut(some_rows(), 4)
    expected = measured(batches)
    norm = math.sqrt(sum(float(g.double().square().sum()) for g in expected[2].values()))
    model, parameters = prepared()
    before = {name: parameter.detach().clone() for name, parameter in parameters.items()}
    descent = torch.optim.SGD(parameters.values(), lr=1.0)
    with use(model):
        result = train_step(padded(model), parameters, descent, batches, clip)
    assert norm > 0.1
    assert result.grad_norm == pytest.approx(norm, rel=1e-5)  # as it was before clipping
    factor = min(1.0, clip / norm) if clip else 1.0
    for name, gradient in expected[2].items():
        moved = before[name] - parameters[name].detach()
        torch.testing.assert_close(moved, gradient * factor, rtol=1e-3, atol=1e-6)
    assert result.loss == pytest.approx(expected[0], rel=1e-6)
    assert result.loss_tokens == expected[1]
    assert result.tokens == sum(len(row.ids) for row in some_rows())


def poison_factor(parameters):
    parameters["model.layers.1.mlp.up_proj.A"].data[0, 0] = float("nan")


def poison_gradient(parameters):
    parameters["model.layers.1.mlp.up_proj.A"].register_hook(lambda gradient: gradient * float("inf"))


@pytest.mark.parametrize(
    ("poison", "found"),
    [(poison_factor, "loss nan"), (poison_gradient, "loss [0-9.]+, gradient norm (nan|inf)")],
)
def test_what_is_not_finite_stops_before_a_parameter_changes(poison, found):
    model, parameters = prepared()
    poison(parameters)
    before = {name: parameter.detach().clone() for name, parameter in parameters.items()}
    optimizer = torch.optim.AdamW(parameters.values(), lr=0.1)
    with pytest.raises(Diverged, match=found), use(model):
        train_step(padded(model), parameters, optimizer, cut(some_rows(), 4), 1.0)
    assert not optimizer.state
    for name, parameter in parameters.items():
        assert torch.equal(parameter.nan_to_num(9.0), before[name].nan_to_num(9.0)), name
        assert parameter.grad is None


def test_a_step_forgets_the_gradient_before_it():
    model, parameters = prepared()
    optimizer = torch.optim.SGD(parameters.values(), lr=0.0)
    batches = cut(some_rows(), 8)
    with use(model):
        norms = {train_step(padded(model), parameters, optimizer, batches, 0.0).grad_norm for _ in range(2)}
    assert len(norms) == 1


class Bypassing(nn.Module):
    """A model that calls one of its layers and only reads the weight of the other, as some models do."""

    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.embed, self.called, self.read = nn.Embedding(96, 8), nn.Linear(8, 8), nn.Linear(8, 96)

    def forward(self, input_ids, **_):
        hidden = self.called(self.embed(input_ids))
        read = getattr(self.read, "base", self.read)
        return SimpleNamespace(logits=nn.functional.linear(hidden, read.weight))


@pytest.mark.parametrize(
    ("targets", "raises"), [(["called"], False), (["called", "read"], True), (["read"], True)]
)
def test_a_module_that_never_runs_is_found(targets, raises):
    model = Bypassing().requires_grad_(False)
    inject(model, new_adapter(model, LoraConfig(rank=2, target_modules=targets)))
    parameters = trainable(model, "default")
    for parameter in parameters.values():
        parameter.requires_grad_(True)
    optimizer = torch.optim.AdamW(parameters.values(), lr=0.1)
    with use(model):
        train_step(padded(model), parameters, optimizer, cut(some_rows(), 4), 1.0)
    if not raises:
        check_used(parameters)
        return
    with pytest.raises(
        TargetError, match=r"unused-adapter: 1 adapted modules .*: read\n(.|\n)*--allow"
    ) as error:
        check_used(parameters)
    assert "called" not in str(error.value)


def test_b_starts_at_zero_and_still_counts_as_used():
    """At the start B is 0, so A's gradient is all zeros: that is no sign of an unused module."""
    model = tiny("llama")
    inject(model, new_adapter(model, LoraConfig(rank=2)))
    parameters = trainable(model, "default")
    for parameter in parameters.values():
        parameter.requires_grad_(True)
    with use(model):
        gradients(padded(model), cut(some_rows(), 4))
    zero = {name: not bool(parameter.grad.any()) for name, parameter in parameters.items()}
    assert zero == {name: name.endswith(".A") for name in parameters}
    check_used(parameters)
