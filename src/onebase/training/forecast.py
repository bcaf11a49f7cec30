"""How long a run is going to take on this machine, and what limits it: `onebase train --plan`."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch

from onebase.config import OptimConfig, TrainConfig
from onebase.data.pack import by_length, by_prefix, prompt_groups, step_rows, steps_per_epoch
from onebase.data.template import Encoded
from onebase.data.trie import filled_length
from onebase.models.base import Base
from onebase.training.plan import Plan
from onebase.training.prepare import Prepared
from onebase.training.speed import ENGINE, MODEL, Prediction, measure_speeds, predict
from onebase.training.work import (
    ATTENTION,
    ELEMENTWISE,
    OPTIMIZER,
    OPTIMIZER_BYTES,
    Decoder,
    Load,
    attention_flop,
    elementwise_bytes,
    load_of,
    padded_load,
    product_flop,
    read_decoder,
    step_products,
)

SAMPLE = 64  # batches whose tokens and pairs are counted; the others of a run are like them
EVALUATION = "evaluation"
# How the ways of scoring (models.scoring) lay out rows.
LOADS: dict[str, Callable[[Sequence[Encoded]], Load]] = {
    "engine": lambda rows: _filled(load_of(rows, True)),
    "packed": lambda rows: load_of(rows, False),
    "padded": padded_load,
}


def forecast(base: Base, config: TrainConfig, ready: Prepared, plan: Plan) -> Prediction | None:
    """The seconds of all optimiser steps and evaluations, from speeds measured now (about two seconds).

    Reading the base and the rows, hashing, saving and sampling answers are not counted. None where the base is of a
    kind whose work cannot be counted (`work.read_decoder`).
    """
    decoder, rows = read_decoder(base.model, ready.coverage), ready.data.train_rows.rows
    if decoder is None:
        return None
    count = LOADS[ready.way.name]
    batches = _first_batches(rows, config)
    loads = [count(batch) for batch in batches]
    load = _mean(loads)
    scale = _rows_seen(len(rows), plan.steps, config.optim) / sum(len(batch) for batch in batches)
    weight = next(base.model.parameters())
    probe = load._replace(
        losses=max(load.losses, 1)
    )  # scoring goes through the head even where training does not
    how = ENGINE if ready.way.name == "engine" else MODEL
    speeds = measure_speeds(decoder, probe, weight.dtype, weight.device, how)
    tokens = round(scale * sum(one.tokens for one in loads))
    per_step = {OPTIMIZER: float(OPTIMIZER_BYTES * plan.trainable)}
    steps = predict(_per_token(decoder, load, weight.dtype), per_step, speeds, tokens, plan.steps)
    scored = _evaluation_loads(ready, config.optim)
    if not scored:
        return steps
    tokens = sum(one.tokens for one in scored) * evaluations(plan.steps, len(rows), config.optim)
    scoring = predict(_per_token(decoder, _mean(scored), weight.dtype, False), {}, speeds, tokens, 0)
    parts = {**steps.parts, EVALUATION: scoring.seconds}
    return Prediction(steps.seconds + scoring.seconds, steps.limit, parts)


def evaluations(steps: int, rows: int, optim: OptimConfig) -> int:
    """How often a run scores its held-out rows: at the start, when due, and at the end."""
    every = optim.eval_every or steps_per_epoch(rows, optim.batch_size, optim.accumulate)
    return 1 + -(-steps // every)


def _per_token(decoder: Decoder, load: Load, dtype: torch.dtype, backward: bool = True) -> dict[str, float]:
    """Operations (or bytes) of each part for one token of such a batch."""
    work = {part: product_flop(p) for part, p in step_products(decoder, load, backward).items()}
    work[ATTENTION] = attention_flop(decoder.attention, load.pairs, backward)
    work[ELEMENTWISE] = elementwise_bytes(decoder, load, dtype.itemsize, backward)
    return {part: amount / load.tokens for part, amount in work.items()}


def _first_batches(rows: Sequence[Encoded], config: TrainConfig) -> list[list[Encoded]]:
    """Up to `SAMPLE` batches of the run's first epoch."""
    optim, groups = config.optim, prompt_groups(rows) if config.optim.group_prompts else ()
    batches: list[list[Encoded]] = []
    for step in range(steps_per_epoch(len(rows), optim.batch_size, optim.accumulate)):
        made = step_rows(len(rows), optim.batch_size, optim.accumulate, config.seed, step, groups)
        batches += [[rows[index] for index in batch] for batch in made]
        if len(batches) >= SAMPLE:
            break
    return batches


def _rows_seen(rows: int, steps: int, optim: OptimConfig) -> int:
    epochs, rest = divmod(steps, steps_per_epoch(rows, optim.batch_size, optim.accumulate))
    return epochs * rows + min(rows, rest * optim.batch_size * optim.accumulate)


def _evaluation_loads(ready: Prepared, optim: OptimConfig) -> list[Load]:
    rows, order = ready.data.valid_rows.rows, by_prefix if ready.way.name == "engine" else by_length
    return [
        LOADS[ready.way.name]([rows[index] for index in batch]) for batch in order(rows, optim.batch_size)
    ]


def _filled(load: Load) -> Load:
    return load._replace(tokens=filled_length(load.tokens))


def _mean(loads: Sequence[Load]) -> Load:
    tokens, losses, pairs = (-(-sum(amounts) // len(loads)) for amounts in zip(*loads, strict=True))
    return Load(tokens, losses, pairs)
