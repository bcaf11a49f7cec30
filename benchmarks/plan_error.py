"""How far `onebase train --plan` is from the time and the memory that the run then takes: three settings, in percent.

Each setting is planned in a fresh process and then run in another. Measured is what the plan foresees: the seconds of
all optimiser steps and evaluations, from metrics.jsonl, and the process's peak resident memory. Settings differ in
rank, length of the rows and batch size; long rows are several of E2E's in one. The gate: the run was the one that was
planned, step for step.
"""

from __future__ import annotations

import argparse
import json
import tempfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple

from benchmarks.common import (
    Gate,
    Numbers,
    Result,
    checked,
    in_fresh_process,
    medians,
    parser,
    show,
    shown,
)
from benchmarks.workload import options
from onebase.training.run import foresee, train

NAME = "plan_error"
LIMIT = 0.2
HELD_OUT = 0.1
WHAT = {"seconds": "s", "mb": "MB"}


class Setting(NamedTuple):
    rank: int
    joined: int  # rows of the file in one row
    batch_size: int


SETTINGS = {
    "rank 8, rows as they are, batch 16": Setting(8, 1, 16),
    "rank 32, rows of 4, batch 4": Setting(32, 4, 4),
    "rank 16, rows of 2, batch 32": Setting(16, 2, 32),
}


def write_rows(data: str, setting: Setting, rows: int, path: Path) -> None:
    """So many rows of this setting's length, spread over the file so that their prompts differ."""
    lines = [json.loads(line) for line in Path(data).read_text(encoding="utf-8").splitlines()]
    stride = max(1, len(lines) // (rows * setting.joined))
    picked = lines[::stride][: rows * setting.joined]
    if len(picked) < rows * setting.joined:
        raise SystemExit(f"{data} has too few rows for {rows} of {setting.joined}")
    joined = [
        {
            "prompt": " ; ".join(row["prompt"] for row in picked[start : start + setting.joined]),
            "completion": " ".join(row["completion"] for row in picked[start : start + setting.joined]),
        }
        for start in range(0, len(picked), setting.joined)
    ]
    path.write_text("".join(json.dumps(row) + "\n" for row in joined), encoding="utf-8")


def run_options(given: argparse.Namespace, setting: Setting, folder: Path) -> dict[str, Any]:
    return {
        "base": given.base,
        "data": str(folder / "rows.jsonl"),
        "output": str(folder / "run"),
        "overwrite": True,
        "dtype": given.dtype,
        "rank": setting.rank,
        "alpha": 2 * setting.rank,
        "batch_size": setting.batch_size,
        "max_steps": given.steps,
        "epochs": 1000,
        "holdout": HELD_OUT,
        "eval_every": given.steps,
        "samples": 0,
    }


def planned(told: Mapping[str, Any]) -> Numbers:
    plan, prediction = foresee(told)
    if prediction is None:
        raise SystemExit("the work of this base cannot be counted, so nothing is predicted")
    return {"seconds": prediction.seconds, "mb": plan.memory / 1e6, "steps": plan.steps, "evaluations": 2}


def measured_run(told: Mapping[str, Any]) -> Numbers:
    run = train(**told)
    if run.record is None:
        raise SystemExit("the run was interrupted")
    metrics = (run.folder / "metrics.jsonl").read_text(encoding="utf-8")
    lines = [json.loads(line) for line in metrics.splitlines()]
    kinds = [line["kind"] for line in lines]
    seconds, mb = sum(line["seconds"] for line in lines), run.record.memory.peak_bytes / 1e6
    return {"seconds": seconds, "mb": mb, "steps": kinds.count("step"), "evaluations": kinds.count("eval")}


SIDES = {"planned": planned, "measured": measured_run}


def main(given: argparse.Namespace) -> None:
    found: dict[str, dict[str, dict[str, float]]] = {}
    with tempfile.TemporaryDirectory() as temporary:
        for number, (name, setting) in enumerate(SETTINGS.items()):
            folder = Path(temporary) / str(number)
            folder.mkdir()
            write_rows(given.data, setting, given.rows, folder / "rows.jsonl")
            told = json.dumps(run_options(given, setting, folder))
            runs: dict[str, list[Numbers]] = {side: [] for side in SIDES}
            for _ in range(given.runs):
                for side in SIDES:
                    runs[side].append(in_fresh_process(__file__, side, "--work", told))
                    print(f"{name}, {side}: {shown(runs[side][-1])}")
            found[name] = {side: medians(numbers) for side, numbers in runs.items()}
    counts = ("steps", "evaluations")
    apart = max(abs(one["planned"][key] - one["measured"][key]) for one in found.values() for key in counts)
    passed = checked(NAME, Gate("steps and evaluations that were not as planned", apart, 0))
    foreseen = {
        f"{what}: {name}": (one["planned"][key], one["measured"][key])
        for key, what in WHAT.items()
        for name, one in found.items()
    }
    rows = [
        (name, f"{plan:.1f}", f"{real:.1f}", f"{plan / real - 1:+.0%}", f"{LIMIT:.0%} either way")
        for name, (plan, real) in foreseen.items()
    ]
    title = f"{given.steps} steps, {given.base}, {given.dtype}, median of {given.runs}"
    show(title, ("setting", "planned", "measured", "error", "target"), rows)
    result = Result(
        NAME,
        {name: abs(plan - real) for name, (plan, real) in foreseen.items()},
        {name: real for name, (_, real) in foreseen.items()},
        {
            name: f"{name.partition(':')[0]}: ours is the plan's error, the peer what was measured"
            for name in foreseen
        },
        dict.fromkeys(foreseen, LIMIT),
        passed,
        given.runs,
    )
    print(result.line())


if __name__ == "__main__":
    made = options(parser(__doc__, runs=3, sides=tuple(SIDES)), without=("steps", "batch-size"))
    made.add_argument("--steps", type=int, default=12, help="optimiser steps of a run (default: 12)")
    made.add_argument("--rows", type=int, default=200, help="rows to train on and hold out (default: 200)")
    made.add_argument("--work", help=argparse.SUPPRESS)
    arguments = made.parse_args()
    if arguments.side:
        print(json.dumps(SIDES[arguments.side](json.loads(arguments.work))))
    else:
        main(arguments)
