"""Seconds to the held-out loss that TRL's SFTTrainer reaches with its defaults after a fixed budget of steps, on E2E.

Three columns train the same adapter (rank 16, alpha 32, all linear layers) on the same tokens, prompts held out whole:
TRL with its defaults (trl_trainer.py), onebase with TRL's batch, learning rate and schedule for as many steps, and
onebase with its own defaults, of which only the learning rate, schedule and batch differ from the second. So first to
second is what speed gives, second to third what the defaults give. Held-out loss is onebase's for all, of TRL from its
saved adapters. Seconds are those of optimiser steps alone: loading, saving and scoring are left out for all. `--runs`
are seeds; each run is a fresh process.
"""

from __future__ import annotations

import argparse
import json
import statistics
import tempfile
from pathlib import Path
from typing import Any, NamedTuple

from benchmarks.common import Gate, Result, checked, conclude, in_fresh_process, parser, show
from benchmarks.variants import split
from benchmarks.workload import Place, load_rows, open_base, options
from onebase.config import LoraConfig
from onebase.evaluation import evaluate
from onebase.models.base import locate_base
from onebase.storage.format import load_adapter
from onebase.training.loop import Evaluated
from onebase.training.run import train

NAME = "time_to_quality"
SPEED, DEFAULTS, WHOLE = "by speed", "by defaults", "to the same held-out loss"
TARGET = {WHOLE: 0.2}
# SFTConfig's defaults, as options of onebase.
THEIRS = {"batch_size": 8, "lr": 2e-5, "schedule": "linear", "warmup": 0, "clip": 1.0, "weight_decay": 0.0}
LORA = LoraConfig()
CLOSE = 0.03  # how far the first two columns' losses may be apart, relative: other draws of A and of the rows


class Task(NamedTuple):
    """What a side is told: where the base and the rows are, the budget, and when our defaults may stop."""

    base: str
    folder: str
    dtype: str
    steps: int
    points: int
    every: int
    seed: int
    wanted: float = 0.0  # the held-out loss that ends a run with our defaults

    @property
    def train(self) -> str:
        return str(Path(self.folder) / "train.jsonl")

    @property
    def valid(self) -> str:
        return str(Path(self.folder) / "valid.jsonl")


Curve = list[tuple[int, float, float]]  # (step, seconds of training, held-out loss)


def trl(task: Task) -> Curve:
    from benchmarks.trl_trainer import trainer

    base = open_base(task.base, task.dtype)
    every = task.steps // task.points
    with tempfile.TemporaryDirectory() as output:
        made, clock = trainer(
            Place(task.base, task.folder, task.dtype),
            load_rows(base, task.train),
            (LORA.rank, LORA.alpha),
            output,
            max_steps=task.steps,
            save_strategy="steps",
            save_steps=every,
            seed=task.seed,
        )
        made.train()
        curve: Curve = [(0, 0.0, evaluate(base, task.valid).loss)]
        for step in range(every, task.steps + 1, every):
            adapter = load_adapter(Path(output) / f"checkpoint-{step}", base)
            loss = evaluate(base, task.valid, adapter).loss
            curve.append((step, sum(clock.seconds[:step]), loss))
    return curve


def with_their_settings(task: Task) -> Curve:
    return _ours(
        task, {**THEIRS, "max_steps": task.steps, "epochs": 1000, "eval_every": task.steps // task.points}
    )


def with_our_defaults(task: Task) -> Curve:
    return _ours(task, {"eval_every": task.every})


def _ours(task: Task, settings: dict[str, Any]) -> Curve:
    curve: Curve = []

    def listen(event: object) -> None:
        if isinstance(event, Evaluated):
            curve.append((event.progress.step, event.progress.seconds, event.metrics["loss"]))

    with tempfile.TemporaryDirectory() as output:
        train(
            task.base,
            listen,
            lambda: curve[-1][2] <= task.wanted,
            data=task.train,
            validation=task.valid,
            output=str(Path(output) / "run"),
            dtype=task.dtype,
            seed=task.seed,
            samples=0,
            **settings,
        )
    return curve


SIDES = {"trl": trl, "same": with_their_settings, "ours": with_our_defaults}


def seconds_to(curve: Curve, loss: float) -> float | None:
    return next((seconds for _, seconds, found in curve if found <= loss), None)


def main(given: argparse.Namespace) -> None:
    if given.steps < given.points:
        raise SystemExit(f"--steps {given.steps} cannot be looked at in {given.points} points")
    given.steps -= given.steps % given.points
    curves: list[dict[str, Curve]] = []
    with tempfile.TemporaryDirectory() as folder:
        split(Path(given.data), Path(folder), given.held_out)
        for seed in range(given.runs):
            found: dict[str, Curve] = {}
            for side in SIDES:
                wanted = found["trl"][-1][2] if side == "ours" else 0.0
                base = str(locate_base(given.base))
                task = Task(base, folder, given.dtype, given.steps, given.points, given.every, seed, wanted)
                found[side] = in_fresh_process(__file__, side, "--work", json.dumps(task))["curve"]
                step, seconds, loss = found[side][-1]
                print(
                    f"seed {seed}, {side}: held-out loss {loss:.4f} after {step} steps, {seconds:.1f} s",
                    flush=True,
                )
            curves.append(found)
    report(given, curves)


def report(given: argparse.Namespace, curves: list[dict[str, Curve]]) -> None:
    """The gates, the points seed by seed, and the medians over seeds."""
    ends = [(found["trl"][-1], found["same"][-1]) for found in curves]
    own = [seconds_to(found["ours"], end[2]) for found, (end, _) in zip(curves, ends, strict=True)]
    unlearned = max(end[2] / found["trl"][0][2] for found, (end, _) in zip(curves, ends, strict=True))
    apart = max(abs(same[2] / end[2] - 1) for end, same in ends)
    passed = checked(
        NAME,
        Gate("TRL's held-out loss as a part of the base's, which it must have lowered", unlearned, 0.999),
        Gate("relative difference of the losses of TRL and of onebase with its settings", apart, CLOSE),
        Gate("seeds in which onebase did not reach TRL's loss", sum(one is None for one in own), 0),
    )
    show_points(given, curves)
    theirs = statistics.median(end[1] for end, _ in ends)
    same = statistics.median(one[1] for _, one in ends)
    ours = statistics.median(one for one in own if one is not None)
    mine = {WHOLE: ours, SPEED: same, DEFAULTS: ours}
    other = {WHOLE: theirs, SPEED: theirs, DEFAULTS: same}
    unit = dict.fromkeys(mine, "s")
    title = f"seconds to the loss of TRL after {given.steps} steps, median of {given.runs} seeds"
    conclude(title, Result(NAME, mine, other, unit, TARGET, passed, given.runs))


def show_points(given: argparse.Namespace, curves: list[dict[str, Curve]]) -> None:
    """Where TRL stood at each point, seed by seed, and when onebase stood there."""
    rows: list[tuple[str, ...]] = []
    for seed, found in enumerate(curves):
        for (step, seconds, loss), (_, same, other) in zip(found["trl"][1:], found["same"][1:], strict=True):
            own = seconds_to(found["ours"], loss)
            ours = ("not reached", "-") if own is None else (f"{own:.1f}", f"{own / seconds:.2f}")
            theirs = (f"{loss:.4f}", f"{seconds:.1f}", f"{other:.4f}", f"{same:.1f}")
            rows.append((str(seed), str(step), *theirs, *ours))
    own_settings = ("onebase: s to TRL's loss", "ratio")
    head = ("seed", "step", "TRL: loss", "s", "onebase, TRL's settings: loss", "s", *own_settings)
    show(f"{given.base}, {given.dtype}, held-out loss in nats a token", head, rows)


if __name__ == "__main__":
    made = options(parser(__doc__, runs=3, sides=tuple(SIDES)), without=("steps", "batch-size"))
    made.add_argument(
        "--steps", type=int, default=100, help="TRL's optimiser steps: its budget (default: 100)"
    )
    made.add_argument("--points", type=int, default=4, help="times that TRL's loss is looked at (default: 4)")
    made.add_argument("--every", type=int, default=4, help="our steps between looks at the loss (default: 4)")
    made.add_argument(
        "--held-out", type=int, default=200, help="rows to hold out, by whole prompts (default: 200)"
    )
    made.add_argument("--work", help=argparse.SUPPRESS)
    arguments = made.parse_args()
    if arguments.side:
        print(json.dumps({"curve": SIDES[arguments.side](Task(*json.loads(arguments.work)))}))
    else:
        main(arguments)
