"""Which variant learns most from the same tokens: held-out loss on E2E, the learning rate tuned for each, over seeds.

Every variant sees the same rows in the same order. Its learning rate is the best of a grid on the first seed; a best
at the grid's edge moves the grid on. Finished runs stand in a file of JSON lines, so that an interrupted benchmark
goes on where it stopped.
"""

from __future__ import annotations

import argparse
import contextlib
import hashlib
import json
import random
import sys
import tempfile
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from statistics import mean, stdev
from typing import Any

from benchmarks.common import Gate, Result, parser, show
from onebase.errors import Diverged
from onebase.models.base import Base, load_base
from onebase.training.loop import Evaluated
from onebase.training.run import train

DATA = Path(__file__).parents[2] / "shared" / "data" / "e2e"
PLAIN = "lora"
VARIANTS: dict[str, dict[str, Any]] = {  # name -> what it adds to plain LoRA of rank 16, alpha 32
    PLAIN: {},
    "rslora": {"rslora": True},
    "lora+": {"lora_plus": 16.0},
    "lora-fa": {"freeze_a": True},
    "dora": {"dora": True},
    "gaussian": {"init": "gaussian"},
    "orthogonal": {"init": "orthogonal"},
    "pissa": {"init": "pissa"},
    "olora": {"init": "olora"},
    "eva": {"init": "eva"},
    "lora_ga": {"init": "lora_ga"},
    "eva, lora-fa": {"init": "eva", "freeze_a": True},
}
GRID = (2.5e-4, 5e-4, 1e-3, 2e-3)
SAME = {
    "float32": 1e-5,
    "bfloat16": 3e-2,
}  # an untrained adapter's loss and the base's: two ways to compute one thing
STEP, MOVES = 2.0, 4  # how a grid goes on beyond its edge, and how often


@dataclass(frozen=True)
class Task:
    """What is the same for every run."""

    base: Base
    rows: Path  # folder of train.jsonl and valid.jsonl
    steps: int
    batch_size: int
    rank: int
    held_out: int
    data: str

    def facts(self) -> dict[str, Any]:
        """What a finished run must agree with to count."""
        return {
            "base": self.base.fingerprint,
            "dtype": self.base.dtype,
            "data": self.data,
            "steps": self.steps,
            "batch_size": self.batch_size,
            "rank": self.rank,
            "held_out": self.held_out,
        }


def split(data: Path, folder: Path, held_out: int) -> None:
    """Hold out whole prompts, the same for every seed, until there are enough rows."""
    groups: dict[str, list[str]] = {}
    for line in data.read_text(encoding="utf-8").splitlines():
        groups.setdefault(json.loads(line)["prompt"], []).append(line)
    prompts = list(groups)
    random.Random(0).shuffle(prompts)
    parts: dict[str, list[str]] = {"valid": [], "train": []}
    for prompt in prompts:
        parts["valid" if len(parts["valid"]) < held_out else "train"] += groups[prompt]
    for name, lines in parts.items():
        (folder / f"{name}.jsonl").write_text("\n".join(lines) + "\n", encoding="utf-8")


def one_run(task: Task, variant: str, lr: float, seed: int) -> dict[str, float]:
    """Train once; the held-out loss after the last step, and what the start changed of the base's."""
    heard: list[Any] = []
    with tempfile.TemporaryDirectory() as folder, contextlib.suppress(Diverged):
        done = train(
            task.base,
            heard.append,
            data=str(task.rows / "train.jsonl"),
            validation=str(task.rows / "valid.jsonl"),
            output=str(Path(folder) / "run"),
            seed=seed,
            lr=lr,
            rank=task.rank,
            alpha=2 * task.rank,
            batch_size=task.batch_size,
            max_steps=task.steps,
            epochs=1000,
            eval_every=task.steps,
            samples=0,
            **VARIANTS[variant],
        )
        losses = [event.metrics["loss"] for event in heard if isinstance(event, Evaluated)]
        record = done.record
        assert record is not None
        assert record.before is not None
        return {
            "loss": losses[-1],
            "base_loss": record.before.loss,
            "start_loss": losses[0],
            "tokens": record.timing.tokens,
            "seconds": record.timing.seconds,
            "trained": record.adapter.parameters,
        }
    return {"loss": float("inf")}  # a rate that is too high


class Results:
    """Finished runs: looked up by all that decides them, else made and appended to the file."""

    def __init__(self, path: Path, task: Task) -> None:
        self.path, self.task = path, task
        path.parent.mkdir(parents=True, exist_ok=True)
        lines = path.read_text(encoding="utf-8").splitlines() if path.exists() else []
        self.known = [json.loads(line) for line in lines]

    def get(self, variant: str, lr: float, seed: int) -> Mapping[str, float]:
        key = {**self.task.facts(), "variant": variant, "options": VARIANTS[variant], "lr": lr, "seed": seed}
        for one in self.known:
            if all(one.get(name) == value for name, value in key.items()):
                return one
        found = key | one_run(self.task, variant, lr, seed)
        with self.path.open("a", encoding="utf-8") as file:
            file.write(json.dumps(found) + "\n")
        self.known.append(found)
        print(f"{variant}, lr {lr:.3g}, seed {seed}: loss {found['loss']:.4f}", file=sys.stderr)
        return found


def tuned(results: Results, variant: str, grid: Iterable[float], moves: int) -> float:
    """The learning rate with the least loss on seed 0; beyond the grid while the best stands at its edge."""
    rates = sorted(grid)
    for _ in range(moves + 1):
        best = min(rates, key=lambda lr: results.get(variant, lr, 0)["loss"])
        if best == rates[-1]:
            rates.append(best * STEP)
        elif best == rates[0]:
            rates.insert(0, best / STEP)
        else:
            break
    return best  # pyright: ignore[reportPossiblyUnboundVariable]


def main(options: argparse.Namespace) -> None:
    data = Path(options.data)
    file = data / "valid.jsonl" if data.is_dir() else data
    if not file.is_file():
        raise SystemExit(f"no rows at {file}: name a JSONL file with prompt and completion by --data")
    grid = tuple(map(float, options.grid.split(",")))
    grid, moves, seeds = (grid[1:2], 0, 1) if options.quick else (grid, options.moves, options.runs)
    with tempfile.TemporaryDirectory() as temporary:
        rows = Path(temporary)
        held_out = min(options.held_out, 20) if options.quick else options.held_out
        split(file, rows, held_out)
        base = load_base(options.base, options.dtype)
        steps = min(options.steps, 4) if options.quick else options.steps
        digest = hashlib.sha256(file.read_bytes()).hexdigest()[:16]
        task = Task(base, rows, steps, options.batch_size, options.rank, held_out, digest)
        results = Results(Path(options.results), task)
        runs: dict[str, list[Mapping[str, float]]] = {}
        for variant in options.variants.split("|"):
            rate = tuned(results, variant, grid, moves)
            runs[variant] = [results.get(variant, rate, seed) for seed in range(seeds)]
    report(runs, task, seeds)


def report(runs: Mapping[str, list[Mapping[str, float]]], task: Task, seeds: int) -> None:
    """The table, and the JSON object as the last line."""
    losses = {variant: [run["loss"] for run in here] for variant, here in runs.items()}
    plain = mean(losses.get(PLAIN, next(iter(losses.values()))))
    table = [
        (
            variant,
            f"{runs[variant][0]['lr']:.2g}",
            f"{mean(found):.4f}",
            f"{stdev(found):.4f}" if len(found) > 1 else "",
            f"{mean(found) - plain:+.4f}",
            f"{runs[variant][0]['trained']:,}",
            f"{mean(run['seconds'] for run in runs[variant]):.0f}",
        )
        for variant, found in losses.items()
    ]
    first = next(iter(runs.values()))[0]
    title = (
        f"held-out loss (nats a token) after {task.steps} steps, {first['tokens']:,} tokens, "
        f"rank {task.rank}, {seeds} seeds; the base's is {first['base_loss']:.4f}"
    )
    head = ("variant", "best lr", "loss", "st. dev.", f"against {PLAIN}", "trained", "training (s)")
    show(title, head, table)
    ended = [run for here in runs.values() for run in here if "start_loss" in run]
    off = max(abs(run["start_loss"] / run["base_loss"] - 1) for run in ended)
    gate = Gate(
        "largest change of the base's loss by an untrained adapter, relative", off, SAME[first["dtype"]]
    )
    ours = {variant: mean(found) for variant, found in losses.items()}
    every = dict.fromkeys
    result = Result(
        "variants", ours, every(ours, plain), every(ours, "nats a token"), every(ours, 1.0), gate, seeds
    )
    print(result.line())


if __name__ == "__main__":
    arguments = parser(__doc__, runs=3)
    arguments.add_argument("--base", default="smollm2-135m", help="the base model")
    arguments.add_argument(
        "--dtype", default="float32", choices=("float32", "bfloat16"), help="the base's dtype"
    )
    arguments.add_argument("--grid", default=",".join(map(str, GRID)), help="learning rates to try first")
    arguments.add_argument(
        "--moves", type=int, default=MOVES, help="how often a grid goes on beyond its edge"
    )
    arguments.add_argument(
        "--data", default=str(DATA), help="a JSONL file of prompts and completions, or E2E's folder"
    )
    arguments.add_argument("--results", default="runs/variants.jsonl", help="the file of finished runs")
    arguments.add_argument("--variants", default="|".join(VARIANTS), help="some of them, with | between")
    arguments.add_argument("--steps", type=int, default=150, help="optimiser steps: the token budget")
    arguments.add_argument("--batch-size", type=int, default=16, help="rows in a step")
    arguments.add_argument("--rank", type=int, default=16, help="rank; alpha is twice as large")
    arguments.add_argument("--held-out", type=int, default=200, help="rows to hold out, by whole prompts")
    arguments.add_argument(
        "--quick", action="store_true", help="one rate, one seed, four steps: does it run?"
    )
    main(arguments.parse_args())
