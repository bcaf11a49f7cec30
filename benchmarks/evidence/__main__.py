"""`python -m benchmarks.evidence run`: the runs that are missing, a row each; `render`: docs/evidence.md from them."""

from __future__ import annotations

import argparse
import sys
import time
from pathlib import Path

from benchmarks.evidence.measure import Bench, run
from benchmarks.evidence.plan import Job, wanted
from benchmarks.evidence.render import PAGE, PICTURES, render
from benchmarks.evidence.rows import COMMITTED, Rows
from benchmarks.evidence.settings import QUICK, REAL
from onebase.errors import OnebaseError
from onebase.files import process_lock

ROOT = Path(__file__).parents[2]
DATA = ROOT.parent / "shared" / "data"


def main(arguments: list[str] | None = None) -> None:
    given = parsed(arguments)
    setting = QUICK if given.quick else REAL
    work = given.work / setting.name
    path = given.rows or (work / "rows.jsonl" if given.quick else COMMITTED)
    rows = Rows(path, setting)
    if given.command == "render":
        render(rows, given.page, given.pictures)
        return
    try:
        go_on(rows, Bench(setting, rows, given.data, work), given)
    except OnebaseError as error:
        raise SystemExit(f"{error}") from error


def go_on(rows: Rows, bench: Bench, given: argparse.Namespace) -> None:
    """Run what is missing, until nothing is or the time is up. A run that is under way elsewhere is passed over."""
    end = time.monotonic() + 60 * given.budget if given.budget else float("inf")
    while time.monotonic() < end:
        rows.read()
        if not any(attempt(rows, bench, job) for job in wanted(rows.setting, rows, given.only, given.quiet)):
            break
    left = len(list(wanted(rows.setting, rows, given.only, given.quiet)))
    print(f"{len(rows.valid())} rows in {rows.path}; {left} runs could start now", file=sys.stderr)


def attempt(rows: Rows, bench: Bench, job: Job) -> bool:
    """Run a job that nobody else runs; whether it was run."""
    with rows.claimed(job, bench.work) as mine:
        if mine:
            start = time.monotonic()
            rows.add(job, run(bench, job))
            if rows.path == COMMITTED:  # the page is never behind its rows
                with process_lock(bench.work / "locks" / "page.lock"):
                    rows.read()
                    render(rows, PAGE, PICTURES)
            print(f"{time.monotonic() - start:6.0f} s  {job.key(rows.setting)}", file=sys.stderr, flush=True)
        return mine


def parsed(arguments: list[str] | None) -> argparse.Namespace:
    made = argparse.ArgumentParser(prog="python -m benchmarks.evidence", description=__doc__)
    made.add_argument("command", choices=("run", "render"))
    made.add_argument(
        "--quick", action="store_true", help="a tiny base and the demo's rows: does it all run?"
    )
    claims = made.add_argument("--only", type=claim_numbers, default=frozenset(), help="claims, such as 4,8")
    claims.metavar = "CLAIMS"
    made.add_argument(
        "--budget", type=float, default=0.0, help="minutes after which no run is started (0: none)"
    )
    made.add_argument("--quiet", action="store_true", help="the machine is idle: timed runs too")
    made.add_argument("--data", type=Path, default=DATA, help="folder of e2e/, wikisql/ and gsm8k/")
    made.add_argument("--rows", type=Path, help="the file of rows (default: docs/evidence/rows.jsonl)")
    made.add_argument(
        "--work", type=Path, default=ROOT / "runs" / "evidence", help="folder of adapters and locks"
    )
    made.add_argument("--page", type=Path, default=PAGE, help="the page to write")
    made.add_argument("--pictures", type=Path, default=PICTURES, help="folder of the pictures")
    return made.parse_args(arguments)


def claim_numbers(text: str) -> frozenset[int]:
    return frozenset(map(int, text.split(",")))


if __name__ == "__main__":
    main()
