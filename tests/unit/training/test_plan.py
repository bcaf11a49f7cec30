"""The plan's numbers, each counted a second way."""

from dataclasses import replace

import pytest

from onebase.adapters.injection import new_adapter
from onebase.config import TrainConfig, build
from onebase.data.trie import filled_length
from onebase.training.loop import total_steps
from onebase.training.plan import make_plan
from onebase.training.prepare import prepare
from texts import QUESTIONS, text_base, write_rows


@pytest.fixture(scope="module")
def base():
    return text_base()


@pytest.fixture(scope="module")
def planned(base, tmp_path_factory):
    path = write_rows(tmp_path_factory.mktemp("rows") / "rows.jsonl", QUESTIONS)

    def make(**options):
        config = build(TrainConfig, {"data": path, "holdout": 3, **options})
        ready = prepare(base, config)
        return make_plan(base, config, ready), ready, config

    return make


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"rank": 3, "target_modules": "q_proj,down_proj,embed_tokens"},
        {"rank_pattern": "q_proj=2", "modules_to_save": "lm_head", "layers": "1"},
    ],
)
def test_parameters_are_those_of_the_adapter(planned, base, options):
    plan, _, config = planned(**options)
    adapter = new_adapter(base.model, config.lora)
    assert plan.trainable == adapter.parameters
    assert plan.total == base.parameters + adapter.parameters
    assert plan.share == adapter.parameters / plan.total
    assert sum(row.modules for row in plan.coverage) == len(adapter.lowrank)


def test_rows_and_tokens(planned):
    plan, ready, _ = planned()
    rows = ready.data.train_rows.rows
    assert (plan.rows, plan.valid_rows) == (24, 3)
    assert plan.tokens == sum(len(row.ids) for row in rows)
    assert plan.loss_tokens == sum(carries for row in rows for carries in row.loss)
    assert 0 < plan.loss_tokens < plan.tokens
    assert plan.way == "engine"
    assert plan.dtype == "float32 (the given model's)"


# (rows, options) -> steps, by hand
STEPS = {
    "whole epochs": (24, {"epochs": 3, "batch_size": 8}, 9),
    "a short last step": (25, {"epochs": 2, "batch_size": 8}, 8),
    "accumulated": (25, {"epochs": 2, "batch_size": 4, "accumulate": 3}, 6),
    "half an epoch": (24, {"epochs": 0.5, "batch_size": 4}, 3),
    "less than a step": (24, {"epochs": 0.01, "batch_size": 4}, 1),
    "cut": (24, {"epochs": 3, "batch_size": 8, "max_steps": 5}, 5),
    "epochs end first": (24, {"epochs": 1, "batch_size": 8, "max_steps": 5}, 3),
    "one row": (1, {"epochs": 1, "batch_size": 16, "accumulate": 4}, 1),
}


@pytest.mark.parametrize("case", STEPS)
def test_steps_by_hand(case):
    rows, options, steps = STEPS[case]
    assert total_steps(rows, build(TrainConfig, options).optim) == steps


def test_memory_grows_with_what_it_is_for(planned, base):
    """An estimate: its parts can be checked, its truth only on a real run."""
    small, ready, _ = planned(rank=2, batch_size=1)
    wide, _, _ = planned(rank=2, batch_size=8)
    ranked, _, _ = planned(rank=16, batch_size=1)
    assert small.memory > base.stored_bytes
    assert wide.memory > small.memory
    tokens = filled_length(max(len(row.ids) for row in ready.data.train_rows.rows))
    more = 4 * tokens * 14 * len(ready.coverage.targets)  # a token's x·Aᵀ, rank 16 instead of 2
    assert ranked.memory - small.memory == 16 * (ranked.trainable - small.trainable) + more
    thrifty, _, _ = planned(rank=2, batch_size=8, recompute=True)
    assert small.memory < thrifty.memory < wide.memory
    padded, _, _ = planned(rank=2, batch_size=8, engine="padded")
    assert padded.memory >= wide.memory


def test_a_base_that_was_stored_in_another_dtype_is_held_twice_while_it_opens(planned, base):
    plan, ready, config = planned(batch_size=1)
    assert plan.opening < plan.running == plan.memory  # stored as it is used
    converted = make_plan(replace(base, stored_bytes=1 << 40), config, ready)
    assert converted.memory == converted.opening
    assert converted.opening - plan.opening == 1 << 40
