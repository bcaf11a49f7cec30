"""Adding an adapter from disk: the first, the 16th and the 500th, against PEFT's `load_adapter`; and switching.

Ours: registered (read whole and checked), in memory, and in a slot of the native step, ready to decode. PEFT's first
makes its wrappers.
The gate: the last one loaded answers as PEFT does.
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Callable
from pathlib import Path
from statistics import median

import torch

from benchmarks.common import Gate, alternate, checked, conclude, medians, parser
from benchmarks.serving import (
    Sides,
    begin,
    compared,
    keep_tokens,
    of_generate,
    of_onebase,
    options,
    other_tokens,
    prompts,
    with_peft,
)
from onebase.models.base import load_base
from onebase.serve.engine import Engine
from onebase.serve.pool import AdapterPool
from onebase.serve.proof import choose_product
from onebase.serve.request import Limits
from onebase.serve.runner import Runner

FOLDERS, MANY, WITH_PEFT = 16, 500, 16
IN_MEMORY = 32  # adapters that the pool may keep
AROUND = 5  # loads whose median is one figure
TARGETS = {"milliseconds: the 1st": 1.0, "milliseconds: the 500th": 1.0, "500th: 1st": 1.2}
ALLOWED = 20.0  # milliseconds


def milliseconds(work: Callable[[], object]) -> float:
    start = time.perf_counter()
    work()
    return (time.perf_counter() - start) * 1e3


def ours(given: argparse.Namespace) -> dict[str, float]:
    base = load_base(given.base, "float32")
    folder, asked = Path(given.folder) / "adapters", prompts(base, given.data, 1)
    pool = AdapterPool(base)
    engine = Engine(base, pool, Limits(slots=2, context=len(asked[0]) + given.tokens + 1))
    runner = Runner(
        base.model, 2, 8, choose_product(base.model, "native").hold
    )  # computes as the engine does

    def add(number: int) -> None:
        one = pool.acquire(pool.load(f"n{number}", folder / f"a{number % FOLDERS}"))
        runner.put(0, one.adapter)
        pool.release(one)
        pool.shrink(IN_MEMORY * one.bytes)

    times = [milliseconds(lambda number=number: add(number)) for number in range(MANY)]
    pinned = [pool.acquire(pool.find(f"n{MANY - 1 - number}")) for number in range(2)]
    switches = [milliseconds(lambda n=n: runner.put(0, pinned[n % 2].adapter)) for n in range(11)]
    said = of_onebase(engine, asked, [f"n{FOLDERS - 1}"], given.tokens)
    keep_tokens(given.folder, "ours", {"last": said.tokens})
    return {
        "1st": times[0],
        "2nd": times[1],
        "16th": median(times[WITH_PEFT - AROUND : WITH_PEFT]),
        "500th": median(times[-AROUND:]),
        "switch": median(switches),
    }


def peer(given: argparse.Namespace) -> dict[str, float]:
    base = load_base(given.base, "float32")
    folder, asked = Path(given.folder) / "adapters", prompts(base, given.data, 1)
    found: dict[str, float] = {}
    model = None
    for number in range(WITH_PEFT):
        start, name = time.perf_counter(), f"a{number}"
        if model is None:
            model = with_peft(base, folder, [name])
        else:
            model.load_adapter(folder / name, adapter_name=name)
        found[str(number + 1)] = (time.perf_counter() - start) * 1e3
    assert model is not None
    switches = [milliseconds(lambda n=n: model.set_adapter(f"a{n}")) for n in range(3)]
    model.set_adapter(f"a{WITH_PEFT - 1}")
    with torch.inference_mode():
        said = of_generate(model, asked, given.tokens)
    keep_tokens(given.folder, "peer", {"last": said.tokens})
    return {"1st": found["1"], "16th": found[str(WITH_PEFT)], "switch": median(switches)}


def main(given: argparse.Namespace) -> None:
    sides = Sides(__file__, given, FOLDERS)
    try:
        runs = alternate(given.runs, sides.run)
        wrong, count = other_tokens(sides.folder)
    finally:
        sides.close()
    gate = checked("adapter_load", Gate(f"greedy tokens of {count:.0f} that are not PEFT's", wrong, 0))
    mine, theirs = medians(runs["ours"]), medians(runs["peer"])
    pairs = {
        "milliseconds: the 1st": (mine["1st"], ALLOWED),
        "milliseconds: the 500th": (mine["500th"], ALLOWED),
        "500th: 1st": (mine["500th"], mine["1st"]),
        "500th: 2nd": (mine["500th"], mine["2nd"]),
        "1st: PEFT's": (mine["1st"], theirs["1st"]),
        "16th: PEFT's": (mine["16th"], theirs["16th"]),
        "switch: PEFT's": (mine["switch"], theirs["switch"]),
    }
    result = compared("adapter_load", pairs, "ms", target=TARGETS, gate=gate, runs=given.runs)
    conclude(f"adding an adapter from disk (at most {ALLOWED:g} ms), and switching", result)


if __name__ == "__main__":
    arguments = options(parser(__doc__, 3), 16).parse_args()
    begin(arguments, main, {"ours": ours, "peer": peer})
