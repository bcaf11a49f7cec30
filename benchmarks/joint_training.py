"""Four adapters trained at once on one base: against four PEFT processes in memory, four runs in turn in time.

The adapters differ in rank and learning rate, and see the same batches, as in `onebase sweep`. PEFT's is its plain
loop; all other sides train with the engine, `processes` four of it. Each run is fresh processes, the sides in turn, the
first two steps not timed. A round is one step of each adapter. Memory is the most that a side's processes hold at once,
from their start on, where pages that several of them map count once (Linux's proportional set size, read every 20 ms).
It is read in runs of its own, as reading it keeps a core busy. The gates: the engine is PEFT, and each adapter trained
jointly is itself alone.
"""

from __future__ import annotations

import argparse
import json
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import NamedTuple

import torch
from torch import Tensor, nn

from benchmarks.common import Gate, Numbers, Result, alternate, checked, conclude, medians, parser, show
from benchmarks.sides import COMPARED, gates
from benchmarks.workload import (
    CLIP,
    EXACT,
    WARM_UP,
    Place,
    on_peft,
    open_base,
    open_plain,
    options,
    prepare,
    read_batches,
    shuffled,
)
from onebase.adapters.adapter import Origin
from onebase.adapters.injection import eject, inject, new_adapter, trainable
from onebase.config import LoraConfig
from onebase.data.template import Encoded
from onebase.data.trie import layout
from onebase.models.base import Base
from onebase.models.engine import Engine
from onebase.models.scoring import loss_tokens
from onebase.storage.format import load_adapter, save_adapter

NAME = "joint_training"
EVERY = 0.02  # seconds between two readings of memory
MEMORY, OURS, TIME = "memory of four PEFT processes", "memory of four of ours", "time of four runs in turn"
TARGET = {MEMORY: 0.35, TIME: 1.0}


class Member(NamedTuple):
    """An adapter of the sweep."""

    rank: int
    lr: float


MEMBERS = (Member(4, 5e-4), Member(8, 5e-4), Member(16, 5e-4), Member(8, 2e-3))
SIDES = {
    "joint": 1,
    "turn": 1,
    "processes": len(MEMBERS),
    "peft_processes": len(MEMBERS),
}  # side -> processes
TIMED = ("joint", "turn")
HELD = {f"{side}, memory": side for side in ("joint", "processes", "peft_processes")}


def adapter_of(place: Place, number: int) -> Path:
    return Path(place.folder) / f"member-{number}"


def save_members(place: Place) -> None:
    """Write each member's start, with B away from 0 so that all of it works."""
    base = open_base(place.base, place.dtype)
    for number, member in enumerate(MEMBERS):
        config = LoraConfig(rank=member.rank, alpha=2.0 * member.rank)
        adapter = new_adapter(base.model, config, number, Origin(str(base.name), base.fingerprint))
        draw = torch.Generator().manual_seed(number)
        low = {
            path: one._replace(B=torch.randn(one.B.shape, generator=draw) * 1e-3)
            for path, one in adapter.lowrank.items()
        }
        save_adapter(replace(adapter, lowrank=low), adapter_of(place, number), overwrite=True)


class Learner(NamedTuple):
    """What learns of one member."""

    parameters: Mapping[str, nn.Parameter]
    optimizer: torch.optim.Optimizer

    @classmethod
    def of(cls, parameters: Mapping[str, nn.Parameter], number: int) -> Learner:
        for parameter in parameters.values():
            parameter.requires_grad_(True)
        optimizer = torch.optim.AdamW(
            parameters.values(), lr=MEMBERS[number].lr, weight_decay=0.0, fused=True
        )
        return cls(parameters, optimizer)


Losses = Callable[[Sequence[Encoded]], list[Tensor]]  # a batch -> the mean loss of each learner


def rounds(
    losses: Losses, learners: Sequence[Learner], batches: Sequence[Sequence[Encoded]]
) -> Iterator[tuple[list[float], float]]:
    """(each learner's loss, seconds) of each round: forward, backward, clipping, AdamW."""
    for batch in batches:
        start = time.perf_counter()
        for learner in learners:
            learner.optimizer.zero_grad(set_to_none=True)
        found = losses(batch)
        torch.stack(found).sum().backward()
        for learner in learners:
            nn.utils.clip_grad_norm_(learner.parameters.values(), CLIP)
            learner.optimizer.step()
        yield [float(loss.detach()) for loss in found], time.perf_counter() - start


def ready(base: Base, place: Place, numbers: Sequence[int]) -> tuple[Losses, list[Learner]]:
    """These members on the base, in one engine, as `onebase train` and `onebase sweep` run them."""
    names = {number: f"member-{number}" for number in numbers}
    for number, name in names.items():
        inject(base.model, load_adapter(adapter_of(place, number), base), name)
    engine = Engine(base.model, *names.values())

    def losses(batch: Sequence[Encoded]) -> list[Tensor]:
        members = [engine.member(name, layout(batch, True)) for name in names.values()]
        return [loss / loss_tokens(batch) for loss in engine.joint_loss(members)]

    return losses, [Learner.of(trainable(base.model, name), number) for number, name in names.items()]


def joint(place: Place, number: int) -> float:
    """Seconds of a round (median) with all members in one pass."""
    return _seconds(*ready(open_base(place.base, place.dtype), place, range(len(MEMBERS))), place)


def turn(place: Place, number: int) -> float:
    """The same, one member's steps after the other's: the sum of their medians."""
    base, total = open_base(place.base, place.dtype), 0.0
    for own in range(len(MEMBERS)):
        total += _seconds(*ready(base, place, [own]), place)
        eject(base.model)
    return total


def process(place: Place, number: int) -> float:
    """One member's step, while the other processes are at theirs."""
    found = ready(open_base(place.base, place.dtype), place, [number])
    return _seconds(*_met(place, number, found), place)


def peft_process(place: Place, number: int) -> float:
    """The same with PEFT's plain loop."""
    work = on_peft(open_plain(place.base, place.dtype), adapter_of(place, number), tuned=False)
    found = (lambda batch: [work.loss(batch)]), [Learner.of(work.parameters, number)]
    return _seconds(*_met(place, number, found), place)


def _met(place: Place, number: int, found: tuple[Losses, list[Learner]]) -> tuple[Losses, list[Learner]]:
    """Wait until all processes have come here."""
    (Path(place.folder) / f"here-{number}").touch()
    while len(list(Path(place.folder).glob("here-*"))) < len(MEMBERS):
        time.sleep(0.05)
    return found


def _seconds(losses: Losses, learners: Sequence[Learner], place: Place) -> float:
    took = [seconds for _, seconds in rounds(losses, learners, read_batches(place))]
    return statistics.median(took[WARM_UP:])


STARTS = {"joint": joint, "turn": turn, "processes": process, "peft_processes": peft_process}


def run_side(run: str, place: Place) -> Numbers:
    """A side's seconds a round, or the most memory in MB that its processes hold together."""
    side = HELD.get(run, run)
    for file in Path(place.folder).glob("here-*"):
        file.unlink()
    command = [sys.executable, "-m", f"benchmarks.{NAME}", "--side", side, "--work", *place]
    running = [
        subprocess.Popen([*command, str(number)], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
        for number in range(SIDES[side])
    ]
    most = 0.0
    while any(one.poll() is None for one in running):
        if run in HELD:
            most = max(most, sum(_held(one.pid) for one in running))
        if any(one.poll() for one in running):  # the others would wait for it
            for one in running:
                one.kill()
        time.sleep(EVERY)
    told = [one.communicate() for one in running]
    if any(one.returncode for one in running):
        raise SystemExit(f"{' '.join(command)} failed:\n{''.join(errors for _, errors in told)}")
    if run in HELD:
        return {"MB": most}
    return {"seconds": max(float(out.strip().splitlines()[-1]) for out, _ in told)}


def _held(process: int) -> float:
    """A process's proportional set size in MB; 0 once it has ended."""
    try:
        lines = Path(f"/proc/{process}/smaps_rollup").read_text(encoding="ascii").splitlines()
    except (FileNotFoundError, ProcessLookupError, PermissionError):
        return 0.0
    return sum(int(line.split()[1]) for line in lines if line.startswith("Pss:")) / 1e3


def equal(place: Place) -> tuple[Gate, ...]:
    """Losses of the first steps and gradients of the first batch: each member jointly against itself alone."""
    base, batches = open_base(place.base, place.dtype), read_batches(place)[:COMPARED]

    def found(numbers: Sequence[int]) -> tuple[list[list[float]], dict[str, Tensor]]:
        losses, learners = ready(base, place, numbers)
        torch.stack(losses(batches[0])).sum().backward()
        slopes = {
            f"{number}.{name}": p.grad.clone()
            for number, learner in zip(numbers, learners, strict=True)
            for name, p in learner.parameters.items()
            if p.grad is not None
        }
        steps = [loss for loss, _ in rounds(losses, learners, batches)]
        eject(base.model)
        return steps, slopes

    together, slopes = found(range(len(MEMBERS)))
    lone = [found([number]) for number in range(len(MEMBERS))]
    loss = max(
        abs(step[number] / other[0] - 1)
        for number, (steps, _) in enumerate(lone)
        for step, other in zip(together, steps, strict=True)
    )
    apart = max(
        float((slopes[name] - slope).norm() / slope.norm()) for _, own in lone for name, slope in own.items()
    )
    losses, gradients = EXACT[place.dtype]
    return checked(
        NAME,
        Gate(
            f"largest relative difference of a loss, jointly and alone, in {len(batches)} steps", loss, losses
        ),
        Gate("largest relative difference of a gradient, jointly and alone", apart, gradients),
    )


def main(given: argparse.Namespace) -> None:
    if not Path("/proc/self/smaps_rollup").exists():
        raise SystemExit(f"{NAME}: memory is read from Linux's /proc, which is not here")
    with tempfile.TemporaryDirectory() as folder:
        place = prepare(given, folder, shuffled)
        save_members(place)
        passed = (*gates(NAME, place), *equal(place))
        runs = alternate(given.runs, lambda run: run_side(run, place), (*TIMED, *HELD))
    found = {run: medians(numbers) for run, numbers in runs.items()}
    rows = [(run, *(f"{value:.4g} {unit}" for unit, value in one.items())) for run, one in found.items()]
    title = (
        f"{given.base}, {given.dtype}, {len(MEMBERS)} adapters, {given.steps} steps of {given.batch_size} rows, "
        f"median of {given.runs}"
    )
    show(title, ("side", "seconds a round, or most memory"), rows)
    held = found["joint, memory"]["MB"]
    mine = {MEMORY: held, OURS: held, TIME: found["joint"]["seconds"]}
    theirs = {
        MEMORY: found["peft_processes, memory"]["MB"],
        OURS: found["processes, memory"]["MB"],
        TIME: found["turn"]["seconds"],
    }
    unit = {MEMORY: "MB", OURS: "MB", TIME: "s a round"}
    conclude(NAME, Result(NAME, mine, theirs, unit, TARGET, passed, given.runs))


if __name__ == "__main__":
    made = options(parser(__doc__, runs=5, sides=tuple(SIDES)))
    made.set_defaults(batch_size=4)
    made.add_argument("--work", nargs=4, help=argparse.SUPPRESS)
    asked = made.parse_args()
    if asked.side:
        *where, number = asked.work
        print(json.dumps(STARTS[asked.side](Place(*where), int(number))))
    else:
        main(asked)
