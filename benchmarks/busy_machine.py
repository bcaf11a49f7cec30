"""Training beside another program that keeps one core busy, and on the idle machine: threads that sleep, and that spin.

GNU's OpenMP lets a thread that waits for the others spin for milliseconds; where one of them has no core, each product
waits for the scheduler. `onebase` commands let threads sleep early (`cli.main.settle_threads`). Sides, each a fresh
process, in turn: ours as the commands run it, ours without that, PEFT's plain loop as its users run it; and how fast
one request is decoded either way. The gates: losses and gradients are PEFT's, and both ways decode the same.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import tempfile
import zlib
from collections.abc import Generator
from contextlib import contextmanager
from pathlib import Path
from statistics import median

from benchmarks.common import (
    Gate,
    Numbers,
    Result,
    alternate,
    checked,
    conclude,
    in_fresh_process,
    medians,
    parser,
)
from benchmarks.serving import begin, new_engine, of_onebase, prompts, write_adapters
from benchmarks.sides import WORKS, gates
from benchmarks.workload import (
    WARM_UP,
    Place,
    open_base,
    options,
    prepare,
    read_batches,
    shuffled,
    tokens,
    train,
)
from onebase.cli.main import SPINS

NAME = "busy_machine"
OURS, SPINNING, PEFT = "ours", "spinning", "peft"
GNU_DEFAULT = "300000"
SETTING = {OURS: SPINS, SPINNING: GNU_DEFAULT, PEFT: GNU_DEFAULT}
CASES = {"idle": 0, "one busy core": 1}
ANSWER = 64  # tokens


@contextmanager
def others(count: int) -> Generator[None]:
    """So many programs at work beside ours."""
    started = [subprocess.Popen([sys.executable, "-c", "while True: pass"]) for _ in range(count)]
    try:
        yield
    finally:
        for one in started:
            one.kill()
            one.wait()


def one_side(given: argparse.Namespace) -> dict[str, float]:
    """Tokens a second of training, and for ours of decoding one request; what both gave, for the gates."""
    place = Place(given.place, given.folder, given.dtype)
    batches = read_batches(place)
    how = WORKS[PEFT if given.side == PEFT else OURS]
    steps = list(train(how.start(how.open(place), place), batches))
    timed = slice(WARM_UP, None)
    found = {
        "training": tokens(batches[timed]) / sum(seconds for _, seconds in steps[timed]),
        "last loss": steps[-1][0],
    }
    return found if given.side == PEFT else {**found, **decoded(given)}


def decoded(given: argparse.Namespace) -> dict[str, float]:
    """Tokens a second of one request, the median of five, and a number that is equal where the tokens are."""
    base = open_base(given.place, given.dtype)
    asked = prompts(base, given.data, 16)[:1]
    engine = new_engine(base, Path(given.folder) / "adapters", "auto", len(asked[0]) + ANSWER + 1)
    runs = [of_onebase(engine, asked, ["a0"], ANSWER) for _ in range(6)][1:]
    digest = zlib.crc32(json.dumps(runs[0].tokens).encode())
    return {"decoding": median(run.per_second for run in runs), "answer": float(digest)}


def main(given: argparse.Namespace) -> None:
    with tempfile.TemporaryDirectory() as folder:
        place = prepare(given, folder, shuffled)
        write_adapters(open_base(given.base, "float32"), Path(folder) / "adapters", 1)
        passed = gates(NAME, place)
        task = ["--place", place.base, "--folder", folder, "--dtype", given.dtype, "--data", given.data]

        def one_run(side: str) -> Numbers:
            os.environ["GOMP_SPINCOUNT"] = SETTING[side]
            return in_fresh_process(__file__, side, *task)

        runs: dict[str, dict[str, list[Numbers]]] = {}
        for case, count in CASES.items():
            with others(count):
                runs[case] = alternate(given.runs, one_run, tuple(SETTING))
    both = [run for found in runs.values() for side in (OURS, SPINNING) for run in found[side]]
    apart = float(len({(run["answer"], run["last loss"]) for run in both}) - 1)
    passed = (*passed, *checked(NAME, Gate("ways of ours that end in another loss or answer", apart, 0)))
    ours, theirs = dict[str, float](), dict[str, float]()
    for case, found in runs.items():
        middle = {side: medians(numbers) for side, numbers in found.items()}
        for what, other in (("training", PEFT), ("training", SPINNING), ("decoding", SPINNING)):
            name = f"{what}, {case}: {other}"
            ours[name], theirs[name] = middle[OURS][what], middle[other][what]
    title = f"{given.base}, {given.dtype}, median of {given.runs}"
    units = dict.fromkeys(ours, "tokens/s")
    conclude(title, Result(NAME, ours, theirs, units, {}, passed, given.runs, more=True))


if __name__ == "__main__":
    made = options(parser(__doc__, runs=3, sides=tuple(SETTING)))
    made.add_argument("--place", help=argparse.SUPPRESS)
    made.add_argument("--folder", help=argparse.SUPPRESS)
    begin(made.parse_args(), main, dict.fromkeys(SETTING, one_side))
