"""`onebase bench`: this machine's ladder, from its matrix products to the engine's, and PEFT's, tokens a second."""

from __future__ import annotations

import importlib
import json
import statistics
import tempfile
import time
import warnings
from collections.abc import Generator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from types import ModuleType
from typing import Any, NamedTuple

import torch
from rich.table import Table
from torch import Tensor, nn

from onebase.adapters.adapter import Adapter, Origin
from onebase.adapters.injection import injected, new_adapter, trainable
from onebase.adapters.targets import match
from onebase.cli.configs import BenchConfig
from onebase.cli.console import console, say
from onebase.config import DataConfig, LoraConfig, OptimConfig, build
from onebase.data.pack import Batch, attention_mask, pad, step_rows
from onebase.data.read import read_examples
from onebase.data.template import Encoded, encode
from onebase.demo import read_demo
from onebase.device import machine
from onebase.errors import BaseError
from onebase.models.base import Base, load_base
from onebase.models.scoring import Loss, choose, loss_tokens, scorer
from onebase.storage.format import save_adapter
from onebase.training.optim import USUAL_LR, make_optimizer
from onebase.training.prepare import tokenizer_of
from onebase.training.record import json_ready
from onebase.training.speed import bound_seconds, measure, part_speed
from onebase.training.step import train_step
from onebase.training.work import (
    FULL,
    Decoder,
    Load,
    Product,
    load_of,
    product_flop,
    read_decoder,
    step_products,
)

NAME = "bench"  # the adapter's name on the model
WARM_UP = 1  # steps before the clock starts
BOUND_SECONDS = 6.0  # what measuring the products may take
# How far the losses of the first step may be apart, relative: rounding, in float32 and in narrower dtypes.
EXACT, NARROW = 1e-4, 3e-2
WAYS = {"engine": "engine", "packed": "packed rows, the model's own layers"}
PEER = "PEFT, padded rows, plain loop"


class Bound(NamedTuple):
    """What a step's matrix products alone would allow, in tokens a second.

    `tokens`: all of them at the speed of the fastest shape, `flops` operations a second. `each`: each at its own
    speed, as in `shapes`.
    """

    tokens: float
    each: float
    flops: float
    shapes: Mapping[Product, float]


@dataclass(frozen=True)
class Rung:
    """A way to train: its tokens a second, and its loss in the first step; or why there is none."""

    name: str
    tokens: float | None = None
    loss: float | None = None
    note: str = ""


class _Task(NamedTuple):
    base: Base
    adapter: Adapter
    batches: list[list[Encoded]]  # the first WARM_UP are not timed
    optim: OptimConfig


def run(options: dict[str, Any]) -> int:
    """Measure and print; returns 1 where two ways do not give the same loss, for their times then mean nothing."""
    config = build(BenchConfig, options)
    base = load_base(config.base, config.dtype)
    task = _task(base, config)
    decoder = read_decoder(base.model, match(base.model, LoraConfig(rank=config.rank)))
    loads = [load_of(batch, share=False) for batch in task.batches[WARM_UP:]]
    dtype = getattr(torch, base.dtype)
    bound = matrix_bound(decoder, loads, dtype, base.device) if decoder else None
    rungs = [*(_ours(task, way, name) for way, name in WAYS.items()), _peft(task)]
    apart = _apart(rungs)
    equal = apart <= (EXACT if base.dtype == "float32" else NARROW)
    facts = _facts(task, config, bound, rungs) | {"losses_apart": apart, "equal": equal}
    if config.json:
        print(json.dumps(json_ready(facts), indent=2))
    elif equal:
        _print(task, bound, rungs, apart)
    if not equal:
        told = ", ".join(f"{rung.name} {rung.loss:.6f}" for rung in rungs if rung.loss is not None)
        say(f"the ways give different losses, so no times are shown: {told}")
    return int(not equal)


def _task(base: Base, config: BenchConfig) -> _Task:
    """The demo's rows in the order of a run, and an adapter whose B is away from 0, so that all of it takes part."""
    data = DataConfig(holdout=0, overlong="truncate")
    examples = read_examples(str(read_demo()), data)
    encoded = encode(tokenizer_of(base), examples, data, base.stop_ids, base.context).rows
    rows = [row for row in encoded if loss_tokens([row])]
    if not rows:
        found = f"its context of {base.context} tokens ends before the demo's answers begin"
        raise BaseError(f"bench on {base.ref}", found)
    steps = range(WARM_UP + config.steps)
    batches = [step_rows(len(rows), config.batch_size, 1, 0, step)[0] for step in steps]
    lora = LoraConfig(rank=config.rank, alpha=2.0 * config.rank)
    fresh = new_adapter(base.model, lora, 0, Origin(base.name, base.fingerprint, "CAUSAL_LM"))
    draw = torch.Generator().manual_seed(0)
    low = {
        path: one._replace(B=torch.randn(one.B.shape, generator=draw) * 1e-3)
        for path, one in fresh.lowrank.items()
    }
    return _Task(
        base,
        replace(fresh, lowrank=low),
        [[rows[index] for index in batch] for batch in batches],
        OptimConfig(lr=USUAL_LR, batch_size=config.batch_size),
    )


# -- The bound.


def matrix_bound(
    decoder: Decoder,
    loads: Sequence[Load],
    dtype: torch.dtype,
    device: torch.device,
    seconds: float = BOUND_SECONDS,
) -> Bound:
    """The bound for these batches: their products, in the shapes of the mean batch, measured now in about so long."""
    mean = Load(*(max(1, round(statistics.mean(amounts))) for amounts in zip(*loads, strict=True)))
    parts = step_products(decoder, mean)
    count = sum(len(products) for products in parts.values())
    shapes: dict[Product, float] = {}
    each = 0.0
    for part, products in parts.items():
        kind = torch.float32 if part == FULL else dtype
        found = measure(products, kind, device, seconds * len(products) / count)
        each += product_flop(products) / part_speed(products, found)
        shapes |= {product: max(speed, shapes.get(product, 0.0)) for product, speed in found.items()}
    tokens = sum(load.tokens for load in loads)
    least = sum(bound_seconds(decoder, load, shapes) for load in loads)
    return Bound(tokens / least, mean.tokens / each, max(shapes.values()), shapes)


# -- The rungs. All train the same adapter on the same rows with the same AdamW.


def _ours(task: _Task, way: str, name: str) -> Rung:
    rows = [row for batch in task.batches for row in batch]
    try:
        chosen = choose(task.base, way, task.adapter, rows)
    except BaseError as reason:
        return Rung(name, note=reason.found)
    with injected(task.base.model, task.adapter, NAME):
        parameters = trainable(task.base.model, NAME)
        for parameter in parameters.values():
            parameter.requires_grad_(True)
        return _timed(name, task, scorer(task.base, chosen, NAME).loss, parameters)


def _peft(task: _Task) -> Rung:
    """The loop that users of PEFT write: padded rows, labels, the model's own loss."""
    module = _installed("peft")
    if module is None:
        return Rung(PEER, note="not installed: pip install peft")
    with _on_peft(module, task) as model:
        parameters = {name: p for name, p in model.named_parameters() if p.requires_grad}
        return _timed(PEER, task, _plain_loss(model, task.base), parameters)


def _installed(name: str) -> ModuleType | None:
    try:
        return importlib.import_module(name)
    except ImportError:
        return None


@contextmanager
def _on_peft(module: ModuleType, task: _Task) -> Generator[Any]:
    """The base as a PeftModel with the adapter, and then as before."""
    with tempfile.TemporaryDirectory() as folder, warnings.catch_warnings(action="ignore"):
        save_adapter(task.adapter, Path(folder) / "adapter")
        model = module.PeftModel.from_pretrained(task.base.model, Path(folder) / "adapter", is_trainable=True)
        try:
            yield model
        finally:
            model.unload()


def _plain_loss(model: Any, base: Base) -> Loss:
    def loss(rows: Sequence[Encoded]) -> Tensor:
        batch: Batch = pad(rows, base.pad_id)
        labels = batch.ids.masked_fill(~batch.loss, -100)
        given = {"input_ids": batch.ids, "attention_mask": attention_mask(batch), "labels": labels}
        moved = {name: tensor.to(base.device) for name, tensor in given.items()}
        return model(**moved).loss * loss_tokens(rows)

    return loss


def _timed(name: str, task: _Task, loss: Loss, parameters: Mapping[str, nn.Parameter]) -> Rung:
    optimizer = make_optimizer(parameters, task.optim)
    losses: list[float] = []
    seconds = 0.0
    for number, rows in enumerate(task.batches):
        start = time.perf_counter()
        losses.append(train_step(loss, parameters, optimizer, [rows], task.optim.clip).loss)
        seconds += time.perf_counter() - start if number >= WARM_UP else 0.0
    tokens = sum(len(row.ids) for rows in task.batches[WARM_UP:] for row in rows)
    return Rung(name, tokens / seconds, losses[0])


def _apart(rungs: Sequence[Rung]) -> float:
    """The largest difference of two ways' losses, relative."""
    losses = [rung.loss for rung in rungs if rung.loss is not None]
    return (max(losses) - min(losses)) / abs(min(losses)) if losses else 0.0


# -- What is shown.


def _facts(task: _Task, config: BenchConfig, bound: Bound | None, rungs: Sequence[Rung]) -> dict[str, Any]:
    best = bound and bound.tokens
    return {
        "base": task.base.ref,
        "dtype": task.base.dtype,
        "batch_size": config.batch_size,
        "rank": config.rank,
        "steps": config.steps,
        "flops": bound and bound.flops,
        "bound": best,
        "bound_each": bound and bound.each,
        "ways": [
            {
                "name": rung.name,
                "tokens_per_second": rung.tokens,
                "share_of_bound": rung.tokens / best if rung.tokens and best else None,
                "against_peft": _against(rung, rungs[-1]),
                "loss": rung.loss,
                "note": rung.note,
            }
            for rung in rungs
        ],
        "machine": machine(),
    }


def _against(rung: Rung, other: Rung) -> float | None:
    return rung.tokens / other.tokens if rung.tokens and other.tokens else None


def _print(task: _Task, bound: Bound | None, rungs: Sequence[Rung], apart: float) -> None:
    timed = task.batches[WARM_UP:]
    tokens = sum(len(row.ids) for rows in timed for row in rows)
    title = f"{task.base.ref}, {task.base.dtype}, {len(timed)} steps of {len(timed[0])} rows, {tokens} tokens"
    table = Table("", "tokens/s", "of the bound", "against PEFT", title=title, title_justify="left")
    if bound is not None:
        fastest = f"bound: all matrix products at {bound.flops / 1e9:.0f} GFLOP/s"
        for name, speed in ((fastest, bound.tokens), ("each product at its own speed", bound.each)):
            table.add_row(name, f"{speed:.0f}", f"{speed / bound.tokens:.0%}", "")
    for rung in rungs:
        share = rung.tokens / bound.tokens if rung.tokens and bound else None
        ratio = _against(rung, rungs[-1])
        table.add_row(
            rung.name, _shown(rung.tokens, "{:.0f}"), _shown(share, "{:.0%}"), _shown(ratio, "{:.2f}x")
        )
    console.print(table)
    say(f"losses of the first step: equal to {apart:.0e} (relative)")
    for rung in rungs:
        if rung.note:
            say(f"{rung.name}: {rung.note}")


def _shown(value: float | None, form: str) -> str:
    return "-" if value is None else form.format(value)
