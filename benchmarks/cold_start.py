"""From the command to the end of the first optimiser step: `onebase train` against a transformers + peft script.

Wall time of fresh processes in turn, from the moment before they are started. Both read the same base folder and rows,
encode all rows, make an adapter of the same shape and take the first step on the same batch. onebase also does what its
users get by default: it checks the rows, proves the engine on the model and hashes the base. Its step ends when it has
written the step's line to metrics.jsonl; the script tells the time itself. One run of each goes before, so that the
disk's cache is warm and onebase remembers the base's fingerprint, as on any run of a base but the first; and so that
Python has kept the bytecode of onebase's modules, as pip does for packages, whatever PYTHONDONTWRITEBYTECODE says.
`peft_kept` is the script under an allocator that keeps its pages.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Mapping, Sequence
from pathlib import Path

from benchmarks.common import Gate, Numbers, Result, alternate, checked, conclude, medians, parser
from benchmarks.sides import KEPT
from benchmarks.workload import EXACT, RANK, options
from onebase.models.base import locate_base

NAME = "cold_start"
OURS, PEER = "ours", "peft"
TARGET = {PEER: 0.5}
# What workload.keep_pages sets, as glibc takes it from outside a process.
ALLOCATOR = {"MALLOC_MMAP_MAX_": "0", "MALLOC_TRIM_THRESHOLD_": str((1 << 31) - 1)}
COMPILED = {"PYTHONDONTWRITEBYTECODE": ""}


def started(command: Sequence[str], environment: Mapping[str, str]) -> tuple[float, str]:
    """(time before the start, what it printed) of a command that ended well."""
    start = time.time()
    done = subprocess.run(
        command, capture_output=True, text=True, check=False, env={**os.environ, **COMPILED, **environment}
    )
    if done.returncode:
        raise SystemExit(f"{' '.join(command)} failed:\n{done.stderr}")
    return start, done.stdout


def ours(given: argparse.Namespace, folder: Path) -> Numbers:
    flags = {
        "base": folder / "base",
        "data": given.data,
        "output": folder / "run",
        "batch-size": given.batch_size,
        "rank": RANK,
        "alpha": 2 * RANK,
        "dtype": given.dtype,
        "max-steps": 1,
        "holdout": 0,
        "samples": 0,
        "seed": 0,
    }
    told = [part for name, value in flags.items() for part in (f"--{name}", str(value))]
    start, _ = started([sys.executable, "-m", "onebase", "train", "--overwrite", *told], {})
    metrics = folder / "run" / "metrics.jsonl"
    (line,) = metrics.read_text(encoding="utf-8").splitlines()
    return {"seconds": metrics.stat().st_mtime - start, "loss": json.loads(line)["loss"]}


def peer(given: argparse.Namespace, folder: Path, environment: Mapping[str, str]) -> Numbers:
    script = Path(__file__).with_name("peft_script.py")
    task = (folder / "base", given.data, given.batch_size, RANK, given.dtype)
    start, printed = started([sys.executable, str(script), *map(str, task)], environment)
    found = json.loads(printed.strip().splitlines()[-1])
    return {"seconds": found["done"] - start, "loss": found["loss"]}


def main(given: argparse.Namespace) -> None:
    with tempfile.TemporaryDirectory() as temporary:
        folder = Path(temporary)
        (folder / "base").symlink_to(locate_base(given.base).resolve())

        def one_run(side: str) -> Numbers:
            if side == OURS:
                return ours(given, folder)
            return peer(given, folder, ALLOCATOR if side.endswith(KEPT) else {})

        first = {side: one_run(side) for side in (OURS, PEER)}
        loss, other = first[OURS]["loss"], first[PEER]["loss"]
        what = "relative difference of the first step's loss from PEFT's"
        passed = checked(NAME, Gate(what, abs(loss / other - 1), EXACT[given.dtype][0]))
        runs = alternate(given.runs, one_run, (OURS, PEER, PEER + KEPT))
    found = {side: medians(numbers)["seconds"] for side, numbers in runs.items()}
    theirs = {side: seconds for side, seconds in found.items() if side != OURS}
    mine = dict.fromkeys(theirs, found[OURS])
    title = f"seconds to the end of the first step, {given.base}, {given.dtype}, median of {given.runs}"
    conclude(title, Result(NAME, mine, theirs, dict.fromkeys(theirs, "s"), TARGET, passed, given.runs))


if __name__ == "__main__":
    main(options(parser(__doc__, runs=5), without=("steps",)).parse_args())
