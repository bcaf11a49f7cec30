"""Training speed on the same batches: onebase without sharing prompts, PEFT plain and tuned, TRL, and the bound.

Tokens a second that are not padding, on E2E rows in a seeded order, rank 8 on all linear layers, AdamW. Each run is a
fresh process, the sides in turn, the first two steps not timed. All run as their users run them, and once more under an
allocator that keeps its pages (`_kept`). Tuned PEFT batches the same rows by length and computes logits only where
there is loss. TRL's defaults include gradient checkpointing; it draws its own order of the same rows (trl_trainer.py).
The bound is what the step's matrix products take at the fastest speed that any of their shapes reaches, measured in
the process of each of our runs.
"""

from __future__ import annotations

import argparse
import tempfile
from collections.abc import Mapping, Sequence

from benchmarks.common import Result, alternate, conclude, medians, parser, show
from benchmarks.sides import KEPT, gates, run_side
from benchmarks.workload import Order, options, prepare, shuffled

NAME = "train_throughput"
PEERS = ("peft", "peft_tuned", "trl")
TARGET = {"peft": 2.4, "peft_tuned": 1.4, "trl": 3.5, "bound": 0.8}
BOUND, EACH = "bound", "each product at its own speed"


def main(given: argparse.Namespace) -> None:
    compare_speed(NAME, given, shuffled, ("ours", *given.peers), TARGET)


def compare_speed(
    name: str, given: argparse.Namespace, order: Order, sides: Sequence[str], target: Mapping[str, float]
) -> None:
    """Gate, timed runs in turn, tables and the result; the first side is ours, a second `ours...` has no gate."""
    own, *others = sides
    peers = [*others, *(one + KEPT for one in sides if given.kept)]
    with tempfile.TemporaryDirectory() as folder:
        place = prepare(given, folder, order)
        passed = gates(name, place, own)
        runs = alternate(given.runs, lambda side: run_side(side, place, "speed"), (own, *peers))
    found = {side: medians(numbers) for side, numbers in runs.items()}
    ours = found[own]
    rows = [
        (side, f"{one['tokens_s']:.0f}", f"{one['step_s']:.2f}", f"{one['peak_mb']:.0f}")
        for side, one in found.items()
    ]
    title = (
        f"{given.base}, {given.dtype}, {given.steps} steps of {given.batch_size} rows, median of {given.runs}"
    )
    show(title, ("side", "tokens/s", "s a step", "peak resident MB, all in all"), rows)
    show_shapes(ours)
    peer = {side: found[side]["tokens_s"] for side in peers}
    if BOUND in ours:
        peer |= {BOUND: ours[BOUND], EACH: ours["each"]}
    mine = dict.fromkeys(peer, ours["tokens_s"])
    wanted = {side: ratio for side, ratio in target.items() if side in peer}
    unit = dict.fromkeys(peer, "tokens/s")
    conclude(name, Result(name, mine, peer, unit, wanted, passed, given.runs, more=True))


def show_shapes(ours: Mapping[str, float]) -> None:
    """The matrix products that the bound was measured with."""
    prefix = "GFLOP/s "
    rows = [
        (name.removeprefix(prefix), f"{speed:.0f}") for name, speed in ours.items() if name.startswith(prefix)
    ]
    if rows:
        show("matrix products, rows x inner x columns", ("shape", "GFLOP/s"), rows)


def speed_options(made: argparse.ArgumentParser, peers: Sequence[str]) -> argparse.ArgumentParser:
    """What the two benchmarks of speed can be told."""
    options(made)
    made.add_argument(
        "--peers", nargs="*", default=peers, choices=peers, help="the peers to run (default: all)"
    )
    text = "also run each side under an allocator that keeps its pages (default: yes)"
    made.add_argument("--kept", action=argparse.BooleanOptionalAction, default=True, help=text)
    return made


if __name__ == "__main__":
    main(speed_options(parser(__doc__, runs=5), PEERS).parse_args())
