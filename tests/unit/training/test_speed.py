"""Predictions by hand; measuring with a clock of our own, for a test must not depend on the machine's speed."""

from __future__ import annotations

from collections import Counter
from itertools import count

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from onebase.training import speed
from onebase.training.speed import (
    ENGINE,
    LARGEST,
    MODEL,
    SMALLEST,
    Prediction,
    bound_seconds,
    cut,
    measure,
    measure_attention,
    measure_speeds,
    measure_stream,
    part_speed,
    predict,
)
from onebase.training.work import Attention, Decoder, Linear, Load, Product


@pytest.fixture
def clock(monkeypatch):
    """Every look at the clock takes 1/64 s, so each run appears to."""
    ticks = count()
    monkeypatch.setattr(speed.time, "perf_counter", lambda: next(ticks) / 64)
    return ticks


def test_a_prediction_by_hand():
    found = predict({"body": 100.0, "head": 30.0}, {"optimiser": 8.0}, SPEEDS, tokens=20, steps=5)
    assert found == Prediction(20.0 + 60.0 + 10.0, "head", {"body": 20.0, "head": 60.0, "optimiser": 10.0})
    # What comes by token and by step adds up in one part.
    both = predict({"body": 100.0}, {"body": 50.0}, SPEEDS, tokens=20, steps=5)
    assert both == Prediction(22.5, "body", {"body": 22.5})
    assert predict({}, {}, {}, 20, 5) == Prediction(0, "", {})


SPEEDS = {"body": 100.0, "head": 10.0, "optimiser": 4.0}


def test_a_part_runs_at_the_speed_of_its_products():
    fast, slow = Product(10, 10, 10), Product(10, 10, 5)  # 2000 and 1000 operations
    measured = {fast: 1000.0, slow: 100.0}
    assert part_speed(Counter({fast: 1}), measured) == 1000
    assert part_speed(Counter({fast: 3, slow: 2}), measured) == 8000 / (3 * 2 + 2 * 10)


def test_the_bound_takes_the_best_speed_for_all():
    decoder = Decoder((Linear(3, 5, gradient=False), Linear(5, 3)), Linear(3, 7), Attention(1, 1, 1, 1))
    forward, back = 2 * 11 * 15, 2 * 11 * 15
    measured = {Product(1, 1, 1): 10.0, Product(2, 2, 2): 4.0}
    assert bound_seconds(decoder, Load(11, 2, 0), measured) == (2 * forward + back + 4 * 2 * 21) / 10


@given(*[st.integers(1, 1 << 18)] * 3, st.floats(0, 1e12))
def test_large_products_are_cut(rows, inner, columns, flop):
    small = cut(Product(rows, inner, columns), flop)
    assert small.flop <= max(flop, SMALLEST)
    assert max(small.rows * small.inner, small.inner * small.columns, small.rows * small.columns) <= LARGEST
    assert all(1 <= new <= old for new, old in zip(small[:3], (rows, inner, columns), strict=True))
    assert cut(small, flop) == small


def test_the_largest_sizes_are_cut_first():
    assert cut(Product(128, 512, 49152), 2 * 128 * 512 * 20000) == Product(128, 512, 12288)
    assert cut(Product(128, 512, 49152, True), 1e12) == Product(128, 512, 49152, True)


def test_speeds_are_operations_over_the_shortest_run(clock):
    small, large = Product(3, 4, 5), Product(64, 32, 16)
    added = large._replace(added=True)
    assert measure([large, added, small, small], torch.float32, seconds=0.5) == {
        small: 120 * 64,
        large: 2 * 64 * 32 * 16 * 64,
        added: 2 * 64 * 32 * 16 * 64,
    }
    attention = Attention(layers=7, trained=3, heads=2, width=8)
    assert measure_attention(attention, 5, torch.float32, seconds=0.1) == 7 * 2 * 8 * 2 * 15 * 64


def test_a_slow_machine_measures_less(clock, monkeypatch):
    """Each run appears to take 1/64 s, so half a second holds some 30: what is left of it is shared out."""
    monkeypatch.setattr(speed, "SMALLEST", 1)
    shapes = [Product(512, 512, size) for size in (512, 513, 514)]
    ran = []
    how = ENGINE._replace(multiply=lambda x, weight: ran.append(x.shape) or x @ weight.T)
    assert measure(shapes, torch.float32, seconds=0.5, how=how).keys() == set(shapes)
    assert len(ran) < 32
    # The probe's 2^25 operations took 1/64 s, so a third of a sixth of a second holds less than these shapes' 2^28.
    assert all(shape[0] * shape[1] < 512 * 512 for shape in ran)


def test_no_time_left_still_gives_every_speed(clock):
    shapes = [Product(100, 100, size) for size in range(1, 20)]
    assert measure(shapes, torch.float32, seconds=0).keys() == set(shapes)


def test_memory_speed_counts_both_ways(clock, monkeypatch):
    monkeypatch.setattr(speed, "STREAM", 1000)
    assert measure_stream(seconds=0.1) == 2 * 4000 * 64


@pytest.mark.parametrize("how", [ENGINE, MODEL])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_every_part_of_a_step_is_measured(monkeypatch, dtype, how):
    monkeypatch.setattr(speed, "STREAM", 1000)
    for name in ("SECONDS", "ATTENTION_SECONDS", "STREAM_SECONDS"):
        monkeypatch.setattr(speed, name, 0.0)
    seen = {}
    original = speed._product_speed
    monkeypatch.setattr(
        speed, "_product_speed", lambda p, d, *rest: seen.setdefault(p, d) and original(p, d, *rest)
    )
    decoder = Decoder((Linear(8, 6, 2), Linear(6, 8, full=True)), Linear(8, 20), Attention(1, 1, 2, 4))
    speeds = measure_speeds(decoder, Load(10, 4, 30), dtype, torch.device("cpu"), how)
    assert speeds.keys() == {
        "frozen layers",
        "low-rank factors",
        "layers trained in full",
        "output head",
        "attention",
        "elementwise work",
        "optimiser",
    }
    assert all(value > 0 for value in speeds.values())
    assert seen[Product(10, 8, 6)] == dtype
    assert seen[Product(10, 8, 2)] == (dtype if how is ENGINE else torch.float32)
    assert seen[Product(8, 10, 6)] == torch.float32  # a layer trained in full
