"""Memory of training above the base's weights: onebase, onebase with recomputation, PEFT's plain loop.

Peak resident memory less what was resident once the base was open and all of its weights had been read, in fresh
processes in turn, on the batches of train_throughput.py. Recomputation is paid for in time: its seconds a step over
those of the engine without it are told beside the claims.
"""

from __future__ import annotations

import argparse
import tempfile

from benchmarks.common import Result, alternate, conclude, medians, parser, show
from benchmarks.sides import KEPT, gates, run_side
from benchmarks.workload import options, prepare, shuffled

NAME = "train_memory"
OURS, SAVING, PEER = "ours", "ours_recompute", "peft"
TARGET = {OURS: 0.25, SAVING: 0.12}
PRICE = "price of recomputation"


def main(given: argparse.Namespace) -> None:
    with tempfile.TemporaryDirectory() as folder:
        place = prepare(given, folder, shuffled)
        passed = gates(NAME, place, OURS) + gates(NAME, place, SAVING)
        sides = (OURS, SAVING, PEER, "peft_tuned", PEER + KEPT)
        runs = alternate(given.runs, lambda side: run_side(side, place, "memory"), sides)
    found = {side: medians(numbers) for side, numbers in runs.items()}
    rows = [(side, f"{one['memory']:.0f}", f"{one['step_s']:.2f}") for side, one in found.items()]
    title = (
        f"{given.base}, {given.dtype}, {given.steps} steps of {given.batch_size} rows, median of {given.runs}"
    )
    show(title, ("side", "MB above the base", "s a step"), rows)
    mine = {side: found[side]["memory"] for side in (OURS, SAVING)}
    theirs = dict.fromkeys(mine, found[PEER]["memory"])
    unit = dict.fromkeys(mine, "MB")
    mine[PRICE], theirs[PRICE], unit[PRICE] = found[SAVING]["step_s"], found[OURS]["step_s"], "s a step"
    conclude(NAME, Result(NAME, mine, theirs, unit, TARGET, passed, given.runs))


if __name__ == "__main__":
    main(options(parser(__doc__, runs=5)).parse_args())
