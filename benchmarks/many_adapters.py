"""1,000 registered adapters: requests spread over them all against requests over 5 of them, and the memory.

Both are ours. A prompt that an adapter has seen is not computed again, so where 16 prompts come again and again, 5
adapters have less to compute than 1,000. That is measured, and beside it what the adapters themselves cost: the same
requests with a first token of their own each, of which nothing can be used again. The gate: a few of the answers are
those of PEFT with that adapter alone.
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Sequence
from pathlib import Path

import torch

from benchmarks.common import Gate, alternate, checked, conclude, medians, parser, peak_resident
from benchmarks.common import Result as Benchmark
from benchmarks.serving import (
    SLOTS,
    Sides,
    begin,
    keep_tokens,
    of_generate,
    options,
    other_tokens,
    prompts,
    with_peft,
)
from onebase.models.base import load_base
from onebase.serve.engine import Engine
from onebase.serve.pool import AdapterPool
from onebase.serve.request import Limits, Request, Result
from onebase.web.server import settle

FOLDERS, REGISTERED, FEW, REQUESTS = 32, 1000, 5, 200
IN_MEMORY = 48  # adapters for which the budget has room
CHECKED = 4
SPREAD, NARROW = "all", "few"
AGAIN, NEW = "throughput: over 5", "throughput, each prompt new: over 5"
TARGETS = {AGAIN: 0.85, NEW: 0.85}
FIRST = 100  # the first of the tokens that make a prompt new


def one_side(given: argparse.Namespace, over: int) -> dict[str, float]:
    base = load_base(given.base, "float32")
    asked = prompts(base, given.data, SLOTS)
    longest, folder = max(map(len, asked)) + given.tokens + 1, Path(given.folder) / "adapters"
    pool = AdapterPool(base)
    start = time.perf_counter()
    pool.load("n0", folder / "a0")
    before = peak_resident()
    for number in range(1, REGISTERED):
        pool.load(f"n{number}", folder / f"a{number % FOLDERS}")
    registered, seconds = peak_resident() - before, time.perf_counter() - start
    engine = Engine(base, pool, Limits(slots=SLOTS, context=longest, queue=REQUESTS))
    pool.budget = IN_MEMORY * pool.find("n0").bytes
    settle()  # as `onebase serve` does
    step = REGISTERED // REQUESTS if over == REGISTERED else 1
    names = [f"n{number * step % over}" for number in range(REQUESTS)]
    own = [asked[number % SLOTS] for number in range(REQUESTS)]
    new = [(FIRST + number, *prompt[1:]) for number, prompt in enumerate(own)]
    of_engine(engine, own[:SLOTS], names[:SLOTS], given.tokens)  # warm
    again, answers = of_engine(engine, own, names, given.tokens)
    before_new = engine.stats()
    fresh, _ = of_engine(engine, new, names, given.tokens)
    reused = before_new.reused_tokens / before_new.prompt_tokens
    side = "ours" if over == REGISTERED else "narrow"
    keep_tokens(given.folder, side, {str(n): [list(answers[n].tokens)] for n in range(CHECKED)})
    return {
        AGAIN: again,
        NEW: fresh,
        "prompt tokens used again": reused,
        "registering, MB": registered,
        "registering, s": seconds,
        "adapters in memory": pool.bytes / pool.find("n0").bytes,
        "loads": float(pool.loads),
    }


def of_engine(
    engine: Engine, asked: Sequence[tuple[int, ...]], names: Sequence[str], count: int
) -> tuple[float, list[Result]]:
    """(tokens a second, the answers) of all requests at once."""
    requests = [
        Request(str(number), prompt, name, max_tokens=count)
        for number, (prompt, name) in enumerate(zip(asked, names, strict=True))
    ]
    start = time.perf_counter()
    answers = engine.generate(requests)
    return len(requests) * count / (time.perf_counter() - start), answers


def peft(given: argparse.Namespace) -> dict[str, float]:
    """The first answers over all adapters by PEFT, which the gate compares."""
    base = load_base(given.base, "float32")
    asked, step = prompts(base, given.data, SLOTS), REGISTERED // REQUESTS
    names = [f"a{number * step % FOLDERS}" for number in range(CHECKED)]
    model, found = with_peft(base, Path(given.folder) / "adapters", names), {}
    with torch.inference_mode():
        for number, name in enumerate(names):
            model.set_adapter(name)
            found[str(number)] = of_generate(model, asked[number : number + 1], given.tokens).tokens
    keep_tokens(given.folder, "peer", found)
    return {}


def main(given: argparse.Namespace) -> None:
    sides = Sides(__file__, given, FOLDERS)
    try:
        sides.run("peft")
        runs = alternate(given.runs, sides.run, (NARROW, SPREAD))
        wrong, count = other_tokens(sides.folder)
    finally:
        sides.close()
    gate = checked("many_adapters", Gate(f"greedy tokens of {count:.0f} that are not PEFT's", wrong, 0))
    mine, narrow = medians(runs[SPREAD]), medians(runs[NARROW])
    units = {
        AGAIN: "tokens/s",
        NEW: "tokens/s",
        "prompt tokens used again": "share",
        "registering, MB": "MB",
        "registering, s": "s",
        "adapters in memory": "adapters",
        "loads": "loads",
    }
    result = Benchmark("many_adapters", mine, narrow, units, TARGETS, gate, given.runs, more=True)
    conclude(f"{REGISTERED} registered adapters, {REQUESTS} requests over all against over {FEW}", result)


if __name__ == "__main__":
    ALL = {
        SPREAD: lambda given: one_side(given, REGISTERED),
        NARROW: lambda given: one_side(given, FEW),
        "peft": peft,
    }
    arguments = options(parser(__doc__, 2, tuple(ALL)), 32).parse_args()
    begin(arguments, main, ALL)
