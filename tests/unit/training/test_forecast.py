"""A run's forecast with speeds that are given: the same amounts, counted a second way."""

from __future__ import annotations

import pytest

from onebase.config import TrainConfig, build
from onebase.data.pack import bucketed, prompt_groups, step_rows
from onebase.data.trie import filled_length
from onebase.training import forecast as module
from onebase.training.forecast import evaluations, forecast
from onebase.training.plan import make_plan
from onebase.training.prepare import prepare
from onebase.training.work import (
    ATTENTION,
    ELEMENTWISE,
    FACTORS,
    FROZEN,
    HEAD,
    OPTIMIZER,
    attention_flop,
    load_of,
    padded_load,
    read_decoder,
)
from texts import QUESTIONS, text_base, write_rows

# Of one token of the tiny Llama in texts.py: two layers of 32 -> 32, 16, 16, 32, 48, 48 and 48 -> 32.
WEIGHTS = 2 * (32 * (32 + 16 + 16 + 32 + 48 + 48) + 48 * 32)
SIZES = 2 * (6 * 32 + 32 + 16 + 16 + 32 + 48 + 48 + 48 + 32)


@pytest.fixture(scope="module")
def base():
    return text_base()


@pytest.fixture
def run(base, tmp_path, monkeypatch):
    """Every part does one operation (or byte) a second, so that the seconds are the amounts."""
    parts = (FROZEN, FACTORS, HEAD, ATTENTION, ELEMENTWISE, OPTIMIZER)
    monkeypatch.setattr(module, "measure_speeds", lambda *_: dict.fromkeys(parts, 1.0))
    path = write_rows(tmp_path / "rows.jsonl", QUESTIONS)

    def make(**options):
        few = {"data": path, "holdout": 3, "batch_size": 4, "rank": 2, "engine": "packed"}
        config = build(TrainConfig, few | options)
        ready = prepare(base, config)
        plan = make_plan(base, config, ready)
        return forecast(base, config, ready, plan), config, ready, plan

    return make


def epoch_loads(ready, config, groups=()):
    rows, optim = ready.data.train_rows.rows, config.optim
    steps = -(-len(rows) // (optim.batch_size * optim.accumulate))
    batches = [
        batch
        for step in range(steps)
        for batch in step_rows(len(rows), optim.batch_size, optim.accumulate, config.seed, step, groups)
    ]
    return [[rows[index] for index in batch] for batch in batches]


def test_the_amounts_of_whole_epochs(run, base):
    found, config, ready, plan = run(epochs=2, accumulate=3)
    vocabulary = base.model.config.vocab_size
    first_input = 32 * 32  # the first layer's q gives no gradient to the embeddings
    assert found.parts[FROZEN] == pytest.approx(2 * plan.tokens * (4 * WEIGHTS - 2 * first_input))
    assert found.parts[FACTORS] == pytest.approx(2 * plan.tokens * 2 * (6 * SIZES - 2 * 32))
    assert found.parts[OPTIMIZER] == pytest.approx(plan.steps * 92 * plan.trainable)
    # What depends on a batch is that of the mean batch, in whole tokens.
    assert found.parts[HEAD] == pytest.approx(2 * plan.loss_tokens * 4 * 32 * vocabulary, rel=0.03)
    pairs = sum(load_of(batch, False).pairs for batch in epoch_loads(ready, config))
    decoder = read_decoder(base.model, ready.coverage)
    assert found.parts[ATTENTION] == pytest.approx(2 * attention_flop(decoder.attention, pairs), rel=0.03)
    assert found.seconds == pytest.approx(sum(found.parts.values()))
    assert found.limit == max(found.parts, key=found.parts.get)


def test_evaluations_run_forward_only(run, base):
    found, _, ready, _ = run(epochs=2, eval_every=5)  # 24 rows, 6 steps an epoch: at 0, 5, 10 and 12
    rows = ready.data.valid_rows.rows
    made = [load_of([rows[i] for i in b], False) for b in bucketed([len(row.ids) for row in rows], 4)]
    forward = 2 * WEIGHTS + 2 * 2 * SIZES + 3 * 4 * SIZES
    loss = (2 * 32 + 6 * 4) * base.model.config.vocab_size
    attention = attention_flop(read_decoder(base.model, ready.coverage).attention, 1, False)
    by_hand = sum(one.tokens * forward + one.losses * loss + one.pairs * attention for one in made)
    assert found.parts["evaluation"] == pytest.approx(4 * by_hand)
    without = run(epochs=2, holdout=0)[0]
    assert "evaluation" not in without.parts


def test_shared_prompts_and_padding_change_the_tokens(run):
    packed, config, ready, plan = run(max_steps=6)
    groups = prompt_groups(ready.data.train_rows.rows)
    stored = sum(filled_length(load_of(batch, True).tokens) for batch in epoch_loads(ready, config, groups))
    shared = run(engine="auto", group_prompts=True, max_steps=6)[0]
    assert stored < plan.tokens
    assert shared.parts[FACTORS] / packed.parts[FACTORS] == pytest.approx(stored / plan.tokens)
    padded = run(engine="padded", max_steps=6)[0]
    width = sum(padded_load(batch).tokens for batch in epoch_loads(ready, config))
    assert padded.parts[FACTORS] / packed.parts[FACTORS] == pytest.approx(width / plan.tokens)


def test_a_part_of_an_epoch_and_a_short_last_step(run):
    """25 rows with 4 in a batch: 7 steps, the last with one row."""
    whole, *_ = run(holdout=2, epochs=1)
    twice, *_ = run(holdout=2, epochs=2)
    assert twice.parts[FACTORS] == pytest.approx(2 * whole.parts[FACTORS])
    short, *_ = run(holdout=2, max_steps=2)
    assert short.parts[FACTORS] == pytest.approx(whole.parts[FACTORS] * 8 / 25, rel=5e-3)  # whole tokens


def test_how_often_a_run_evaluates():
    def times(steps, every):
        return evaluations(steps, 24, build(TrainConfig, {"batch_size": 4, "eval_every": every}).optim)

    assert [times(6, 0), times(7, 0), times(12, 0)] == [2, 3, 3]
    assert [times(6, 2), times(7, 2), times(1, 5)] == [4, 5, 2]


def test_the_real_speeds_give_a_time(base, tmp_path, monkeypatch):
    monkeypatch.setattr("onebase.training.speed.SECONDS", 0.05)
    monkeypatch.setattr("onebase.training.speed.STREAM", 1000)
    path = write_rows(tmp_path / "rows.jsonl", QUESTIONS)
    config = build(TrainConfig, {"data": path, "batch_size": 4, "target_modules": "lm_head"})
    ready = prepare(base, config)
    found = forecast(base, config, ready, make_plan(base, config, ready))
    assert 0 < found.seconds < 3600
    assert found.limit in found.parts
