"""AdamW by parameter name, LoRA+ groups, and the schedules against values worked out by hand."""

import copy

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import nn

from onebase.config import OptimConfig
from onebase.errors import ConfigError, FormatError
from onebase.training.optim import (
    SHAPES,
    lr_factor,
    make_optimizer,
    optimizer_tensors,
    restore_optimizer,
    set_lr,
    usual_lr,
)

# (options, total steps) -> the factor of every step
BY_HAND = {
    "linear": ({"schedule": "linear", "warmup": 0}, [1, 0.75, 0.5, 0.25]),
    "linear, a fraction": (
        {"schedule": "linear", "warmup": 0.2},
        [1 / 3, 2 / 3, 1, 7 / 8, 6 / 8, 5 / 8, 4 / 8, 3 / 8, 2 / 8, 1 / 8],
    ),
    "linear, steps": ({"schedule": "linear", "warmup": 3}, [1 / 4, 2 / 4, 3 / 4, 1, 1 / 2]),
    "one step of warm-up": ({"schedule": "linear", "warmup": 1}, [1 / 2, 1, 2 / 3, 1 / 3]),
    "cosine": ({"schedule": "cosine", "warmup": 0}, [1, 0.8535533906, 0.5, 0.1464466094]),
    "cosine, steps": ({"schedule": "cosine", "warmup": 2}, [1 / 3, 2 / 3, 1, 0.75, 0.25]),
    "constant": ({"schedule": "constant", "warmup": 0.4}, [1 / 3, 2 / 3, 1, 1, 1]),
    "all warm-up": ({"schedule": "cosine", "warmup": 9}, [1 / 10, 2 / 10, 3 / 10]),
    "a fraction that rounds to none": ({"schedule": "linear", "warmup": 0.03}, [1, 0.5]),
    "one step": ({"schedule": "linear"}, [1]),
}


@pytest.mark.parametrize("case", BY_HAND)
def test_schedules_by_hand(case):
    options, factors = BY_HAND[case]
    config = OptimConfig(**options)
    found = [lr_factor(step, len(factors), config) for step in range(len(factors))]
    assert found == pytest.approx(factors, abs=1e-9)


@given(
    total=st.integers(1, 500),
    warmup=st.one_of(st.floats(0, 0.99), st.integers(0, 600)),
    schedule=st.sampled_from(sorted(SHAPES)),
)
def test_every_step_learns_and_none_beyond_the_peak(total, warmup, schedule):
    config = OptimConfig(warmup=warmup, schedule=schedule)
    factors = [lr_factor(step, total, config) for step in range(total)]
    assert all(0 < factor <= 1 for factor in factors)
    top = factors.index(max(factors))
    assert factors[: top + 1] == sorted(factors[: top + 1])
    assert factors[top:] == sorted(factors[top:], reverse=True)


def factors_of(seed=0):
    generator = torch.Generator().manual_seed(seed)
    shapes = {"up.A": (2, 5), "up.B": (3, 2), "head.weight": (4,)}
    return {name: nn.Parameter(torch.randn(shape, generator=generator)) for name, shape in shapes.items()}


def step(optimizer, parameters, seed):
    generator = torch.Generator().manual_seed(seed)
    for parameter in parameters.values():
        parameter.grad = torch.randn(parameter.shape, generator=generator)
    optimizer.step()


def test_lora_plus_is_for_b_alone():
    parameters = factors_of()
    optimizer = make_optimizer(parameters, OptimConfig(lr=0.25, lora_plus=16))
    assert set_lr(optimizer, 0.5) == 0.125
    rates = {id(p): group["lr"] for group in optimizer.param_groups for p in group["params"]}
    assert {n: rates[id(p)] for n, p in parameters.items()} == {
        "up.A": 0.125,
        "up.B": 2.0,
        "head.weight": 0.125,
    }


def test_the_usual_rate_falls_with_the_roots_of_wide_bases():
    assert [usual_lr(width) for width in (64, 576, None)] == [1e-3] * 3
    assert [usual_lr(width) for width in (2304, 5184)] == pytest.approx([5e-4, 1e-3 / 3])


@pytest.mark.parametrize("width", [1024, 1536, 2048, 3072, 4096])
def test_the_usual_rate_is_near_what_others_fitted(width):
    fitted = [5e-4 * (2000 / width) ** power for power in (0.0775, 0.781)]
    assert min(fitted) / 1.1 < usual_lr(width) < max(fitted) * 1.1


def test_no_rate_is_no_training():
    with pytest.raises(ConfigError, match="lr"):
        make_optimizer({"x.A": nn.Parameter(torch.zeros(1))}, OptimConfig())


def test_the_options_reach_adamw():
    options = {"lr": 0.5, "beta1": 0.7, "beta2": 0.8, "eps": 1e-3, "weight_decay": 0.25}
    (group,) = make_optimizer({"x.A": nn.Parameter(torch.zeros(1))}, OptimConfig(**options)).param_groups
    assert (group["betas"], group["eps"], group["weight_decay"]) == ((0.7, 0.8), 1e-3, 0.25)


def test_the_state_comes_back_bit_for_bit():
    config = OptimConfig(lr=0.1, lora_plus=4, weight_decay=0.1)
    one = factors_of()
    first = make_optimizer(one, config)
    for seed in range(3):
        step(first, one, seed)
    stored = {name: tensor.clone() for name, tensor in optimizer_tensors(first, one).items()}
    assert set(stored) == {f"{name}/{key}" for name in one for key in ("exp_avg", "exp_avg_sq", "step")}

    two = {name: nn.Parameter(parameter.detach().clone()) for name, parameter in one.items()}
    second = make_optimizer(two, config)
    restore_optimizer(second, two, stored)
    again = optimizer_tensors(second, two)
    assert all(torch.equal(again[name], tensor) for name, tensor in stored.items())
    before = copy.deepcopy(stored)
    for seed in (7, 8):
        step(first, one, seed)
        step(second, two, seed)
    assert all(torch.equal(one[name], two[name]) for name in one)
    assert all(torch.equal(stored[name], before[name]) for name in ("up.A/step", "up.B/step"))


def test_a_parameter_that_never_had_a_gradient_comes_back_too():
    """With `--allow unused-adapter` some never get one: a resumed run must treat them as if it had not stopped."""
    one = factors_of()
    first = make_optimizer(one, OptimConfig(lr=0.1))
    for name in ("up.A", "head.weight"):
        one[name].grad = torch.ones_like(one[name])
    first.step()
    two = {name: nn.Parameter(parameter.detach().clone()) for name, parameter in one.items()}
    second = make_optimizer(two, OptimConfig(lr=0.1))
    restore_optimizer(second, two, optimizer_tensors(first, one))
    step(first, one, 5)
    step(second, two, 5)
    assert all(torch.equal(one[name], two[name]) for name in one)


def test_a_missing_tensor_is_named():
    parameters = factors_of()
    optimizer = make_optimizer(parameters, OptimConfig(lr=1e-3))
    step(optimizer, parameters, 0)
    stored = optimizer_tensors(optimizer, parameters)
    del stored["up.B/exp_avg_sq"]
    with pytest.raises(FormatError, match=r"lacks up\.B/exp_avg_sq"):
        restore_optimizer(optimizer, parameters, stored)
