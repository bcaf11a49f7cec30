"""One side of a training benchmark in a fresh process: its speed, its memory, or its losses and gradients.

`python -m benchmarks.sides --side SIDE --work BASE FOLDER DTYPE TASK`; the benchmarks call it.
"""

from __future__ import annotations

import argparse
import json
import statistics
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import torch
from safetensors.torch import load_file, save_file

from benchmarks.common import Gate, Numbers, checked, in_fresh_process, measured, peak_resident
from benchmarks.workload import (
    ALPHA,
    EXACT,
    RANK,
    WARM_UP,
    Place,
    Work,
    bucketed,
    gradients,
    keep_pages,
    on_peft,
    open_base,
    open_plain,
    our_work,
    read_batches,
    tokens,
    train,
)
from onebase.adapters.targets import match
from onebase.cli.bench import Bound, matrix_bound
from onebase.config import LoraConfig
from onebase.data.template import Encoded
from onebase.models.base import Base
from onebase.training.work import load_of, read_decoder

COMPARED = 5  # steps whose losses must agree
BOUND_SECONDS = 12.0  # what measuring the matrix products may take


def run_side(side: str, place: Place, task: str) -> dict[str, float]:
    """What a side gives for a task, in a process of its own."""
    return in_fresh_process(__file__, side, "--work", *place, task)


class Side(NamedTuple):
    """How a side opens the base, and what it then makes of it to train."""

    open: Callable[[Place], Any]
    start: Callable[[Any, Place], Work]
    bucketed: bool = False  # whether it batches the timed rows by length
    share: bool = False


def _ours(share: bool = False, recompute: bool = False) -> Side:
    return Side(
        lambda place: open_base(place.base, place.dtype),
        lambda base, place: our_work(base, place.adapter, share, recompute),
        share=share,
    )


def _peft(tuned: bool) -> Side:
    return Side(
        lambda place: open_plain(place.base, place.dtype),
        lambda model, place: on_peft(model, place.adapter, tuned),
        tuned,
    )


WORKS = {
    "ours": _ours(),
    "ours_shared": _ours(share=True),
    "ours_unshared": _ours(),
    "ours_recompute": _ours(recompute=True),
    "peft": _peft(tuned=False),
    "peft_tuned": _peft(tuned=True),
}
KEPT = "_kept"  # behind a side's name: under an allocator that keeps its pages (workload.keep_pages)
TRL = "trl"  # its trainer has its own loop


def speed(side: str, place: Place) -> Numbers:
    """Tokens a second that are not padding, seconds a step (median), and the process's peak memory in MB."""
    batches = read_batches(place)
    warm, timed = batches[:WARM_UP], batches[WARM_UP:]
    if side == TRL:
        from benchmarks.trl_trainer import step_times

        rows = [row for batch in batches for row in batch]
        return _speed(*step_times(place, rows, len(batches[0]), (RANK, ALPHA)))
    how = WORKS[side]
    work = how.start(how.open(place), place)
    timed = bucketed(timed) if how.bucketed else timed
    seconds = [took for _, took in train(work, [*warm, *timed])]
    found = _speed(seconds, [tokens([batch]) for batch in [*warm, *timed]])
    return {**found, **_bound(work.base, timed, how.share)} if work.base else found


def _speed(seconds: Sequence[float], counts: Sequence[int]) -> dict[str, float]:
    timed = slice(WARM_UP, None)
    return {
        "tokens_s": sum(counts[timed]) / sum(seconds[timed]),
        "step_s": statistics.median(seconds[timed]),
        "peak_mb": peak_resident(),
    }


def _bound(base: Base, batches: Sequence[Sequence[Encoded]], share: bool) -> Numbers:
    """What the matrix products allow in tokens a second, and GFLOP/s by their shape: rows x inner x columns."""
    decoder = read_decoder(base.model, match(base.model, LoraConfig(rank=RANK, alpha=ALPHA)))
    if decoder is None:
        return {}
    loads = [load_of(batch, share) for batch in batches]
    dtype = getattr(torch, base.dtype)
    found: Bound = matrix_bound(decoder, loads, dtype, base.device, BOUND_SECONDS)
    once = tokens(batches) / sum(load.tokens for load in loads)  # above 1 where prompts are shared
    shapes = {
        f"GFLOP/s {one.rows} x {one.inner} x {one.columns}{' added' * one.added}": flops / 1e9
        for one, flops in found.shapes.items()
    }
    return {"bound": found.tokens * once, "each": found.each * once, "gflops": found.flops / 1e9, **shapes}


def memory(side: str, place: Place) -> Numbers:
    """Peak resident MB of training above what the opened base takes, and seconds a step (median)."""
    how, batches = WORKS[side], read_batches(place)
    opened = how.open(place)
    model = opened.model if isinstance(opened, Base) else opened
    for parameter in model.parameters():
        parameter.sum()  # mapped weights become resident: they are the base's, not the training's
    with measured() as found:
        work = how.start(opened, place)
        seconds = [took for _, took in train(work, batches)]
    return {"memory": found["memory"], "step_s": statistics.median(seconds[WARM_UP:])}


def compare(side: str, place: Place) -> Numbers:
    """The losses of the first steps; the first batch's gradients go into a file."""
    how, batches = WORKS[side], read_batches(place)[:COMPARED]
    work = how.start(how.open(place), place)
    save_file(
        {name: gradient.contiguous() for name, gradient in gradients(work, batches[0]).items()},
        Path(place.folder) / f"{side}.safetensors",
    )
    return {str(number): loss for number, (loss, _) in enumerate(train(work, batches))}


def gates(name: str, place: Place, side: str = "ours") -> tuple[Gate, ...]:
    """Losses of the first steps and gradients of the first batch against PEFT's plain loop, before anything is timed.

    Ends the benchmark where they are not equal.
    """
    sides = (side, "peft")
    ours, theirs = (run_side(one, place, "compare") for one in sides)
    loss = max(abs(ours[step] - theirs[step]) / abs(theirs[step]) for step in theirs)
    mine, other = (load_file(Path(place.folder) / f"{one}.safetensors") for one in sides)
    if mine.keys() != other.keys():
        raise SystemExit(f"{name}: the sides train different parameters")
    whole, apart = (
        sum(float(t.double().square().sum()) for t in found) ** 0.5
        for found in (other.values(), [mine[key] - other[key] for key in other])
    )
    losses, slopes = EXACT[place.dtype]
    return checked(
        name,
        Gate(
            f"{side}: largest relative difference of the loss from PEFT's in {len(theirs)} steps",
            loss,
            losses,
        ),
        Gate(f"{side}: relative difference of the whole gradient from PEFT's", apart / whole, slopes),
    )


TASKS = {"speed": speed, "memory": memory, "compare": compare}


def main(given: argparse.Namespace) -> None:
    *place, task = given.work
    side = given.side.removesuffix(KEPT)
    if side != given.side:
        keep_pages()
    print(json.dumps(TASKS[task](side, Place(*place))))


if __name__ == "__main__":
    made = argparse.ArgumentParser(description=__doc__)
    made.add_argument(
        "--side", required=True, help=", ".join([*WORKS, TRL]) + f"; {KEPT}: an allocator that keeps pages"
    )
    made.add_argument("--work", nargs=4, required=True, help=f"base, folder, dtype, {' or '.join(TASKS)}")
    main(made.parse_args())
