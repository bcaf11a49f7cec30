"""`sweep`: a grid of runs on one frozen base, trained at once where the engine takes them, each as if alone.

The runs go in step. Each one's loop stops where its next step is due; then the rows of all run through the base as
one batch, each with its own adapter, and each loop goes on with its own gradients.
"""

from __future__ import annotations

import json
import time
from collections.abc import Callable, Generator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from onebase.adapters.adapter import Adapter
from onebase.adapters.injection import adapter_dropout, eject, eval_mode, inject, use
from onebase.config import TrainConfig, build
from onebase.data.trie import layout
from onebase.device import available_memory
from onebase.errors import ConfigError, OnebaseError
from onebase.files import process_lock, write_text
from onebase.grid import Point, grid
from onebase.models.base import Base
from onebase.models.engine import Engine
from onebase.models.engine import Member as Part
from onebase.models.scoring import Thrift, loss_tokens
from onebase.training import checkpoint
from onebase.training.distributed import Hashed, hash_ahead, joined
from onebase.training.finish import Outcome, finish
from onebase.training.loop import Due, Event, Finished
from onebase.training.plan import Plan, memory_together, shared_memory
from onebase.training.prepare import Data, with_task
from onebase.training.record import json_ready
from onebase.training.run import (
    LOCK,
    OPTIONS,
    Job,
    Run,
    base_for,
    claim,
    drive,
    first_adapter,
    make_job,
    open_folder,
    read_config,
)
from onebase.training.step import Given

RESULTS = "sweep.json"


@dataclass(frozen=True)
class SweepPlan:
    """What a sweep is going to do: each run's plan by name, and which runs train at once, group after group."""

    plans: Mapping[str, Plan]
    groups: tuple[tuple[str, ...], ...]
    memory: int  # the largest group's, estimated, in bytes


class Heard(NamedTuple):
    """An event of one of the runs."""

    name: str
    event: Event


Listener = Callable[[SweepPlan | Heard], None]


@dataclass(frozen=True)
class Swept:
    """How one run of a sweep ended. `run` is None where it failed (`error` says how) or was not started."""

    name: str
    varied: Mapping[str, Any]
    folder: Path
    run: Run | None = None
    error: OnebaseError | None = None

    @property
    def loss(self) -> float | None:
        """The kept adapter's loss on the held-out rows; None without them or before the end."""
        record = self.run.record if self.run else None
        return record.after.loss if record and record.after else None


def sweep(
    base: Base | str | None = None,
    /,
    listener: Listener | None = None,
    stop: Callable[[], bool] = lambda: False,
    together: int = 0,
    **options: Any,
) -> list[Swept]:
    """Train a grid of adapters: options are `train`'s, and those of `grid.SWEPT` may have several values.

    Each run gets a folder inside `output`, with what `train` with its options alone writes: the same batches, the same
    losses but for rounding. `together` is how many train at once (0: as many as the plan's estimate of memory
    allows); on a base that the engine does not take they train in turn. A run that fails is left out and the others
    go on. Returns the runs, the least held-out loss first, and writes them to `output`/sweep.json. Raises OnebaseError
    before anything is written if the options, the data, the targets or the base are not right.
    """
    base = options.pop("base", base)
    if base is not None:
        options["base"] = base.ref if isinstance(base, Base) else str(base)
    points, configs = _configs(options, together)
    snapshots = [claim(config) for config in configs]
    if not isinstance(base, Base):
        base = base_for(configs[0], snapshots[0])
    jobs = _jobs(base, points, list(zip(configs, snapshots, strict=True)))
    groups = _groups(base, jobs, together)
    if listener:
        listener(_plan(base, groups))
    ended: dict[str, Run | OnebaseError] = {}
    for group in groups:
        if not stop():
            # A head is drawn for each run: one that has such a base trains alone.
            ended |= _train_group(group[0].base, group, listener, stop)
    results = sorted((_swept(point, job, ended) for point, job in zip(points, jobs, strict=True)), key=_rank)
    rows = [_row(one) for one in results]
    write_text(Path(options["output"]).expanduser() / RESULTS, json.dumps(json_ready(rows), indent=2) + "\n")
    return results


def foresee_sweep(options: Mapping[str, Any], together: int = 0) -> SweepPlan:
    """What `sweep` with these options would do; nothing is written."""
    points, configs = _configs({**options, "resume": False}, together)
    base = base_for(configs[0], None)
    return _plan(base, _groups(base, _jobs(base, points, [(config, None) for config in configs]), together))


def _configs(options: Mapping[str, Any], together: int) -> tuple[list[Point], list[TrainConfig]]:
    """The grid's points and each one's config; those whose folder holds a run go on with it on resume."""
    if together < 0:
        raise ConfigError(f"option together={together}", "must be 0 or more")
    with joined() as world:
        if world.size > 1 or options.get("shard_base"):
            raise ConfigError("sweep", "it runs in one process", hint="sweep without torchrun")
    if not options.get("output"):
        hint = "name a folder for the runs: --output runs/sweep"
        raise ConfigError("option output", "is empty", hint=hint)
    if options.get("cache_activations"):
        found = "runs that train at once pass through the base together, each from its own first layer on"
        raise ConfigError(
            "option cache_activations", found, hint="leave it out, or train each with `onebase train`"
        )
    points, configs = grid(options), list[TrainConfig]()
    for point in points:
        folder = Path(options["output"]) / point.name
        resume = build(TrainConfig, point.options).resume and (folder.expanduser() / OPTIONS).is_file()
        configs.append(read_config({**point.options, "output": str(folder), "resume": resume}))
    return points, configs


def _jobs(
    base: Base, points: Sequence[Point], starts: Sequence[tuple[TrainConfig, checkpoint.Snapshot | None]]
) -> list[Job]:
    """A job for each run; those of one seed have their rows in common."""
    data: dict[int, Data] = {}
    jobs: list[Job] = []
    for point, (config, snapshot) in zip(points, starts, strict=True):
        own, read = with_task(base, config, data.get(config.seed))
        job = make_job(own, config, snapshot, read)
        data[config.seed] = job.ready.data
        jobs.append(replace(job, name=point.name))
    return jobs


def _groups(base: Base, jobs: Sequence[Job], together: int) -> list[list[Job]]:
    """Which runs train at once: those that the engine takes, as many as may; the others each alone."""
    room = available_memory() + shared_memory(base)  # what they share is held already
    groups: list[list[Job]] = []
    joint: list[Job] = []
    for job in jobs:
        if job.ready.way.name != "engine":
            groups.append([job])
            continue
        needed = memory_together(base, [one.plan for one in (*joint, job)])
        if not joint or (len(joint) == together if together else needed > room):
            joint = []
            groups.append(joint)
        joint.append(job)
    return groups


def _plan(base: Base, groups: Sequence[Sequence[Job]]) -> SweepPlan:
    plans = {job.name: job.plan for group in groups for job in group}
    memory = max(memory_together(base, [job.plan for job in group]) for group in groups)
    return SweepPlan(plans, tuple(tuple(job.name for job in group) for group in groups), memory)


def _swept(point: Point, job: Job, ended: Mapping[str, Run | OnebaseError]) -> Swept:
    found = ended.get(point.name)
    if isinstance(found, Run):
        return Swept(point.name, point.varied, job.folder, run=found)
    return Swept(point.name, point.varied, job.folder, error=found)


def _rank(one: Swept) -> tuple[bool, float, str]:
    loss = one.loss
    return loss is None, loss or 0.0, one.name


def _row(one: Swept) -> dict[str, Any]:
    """A run as JSON."""
    ended = one.run.reason if one.run else "failed" if one.error else "not started"
    step = one.run.progress.step if one.run else None
    error = str(one.error) if one.error else None
    return {
        "name": one.name,
        **one.varied,
        "loss": one.loss,
        "ended": ended,
        "step": step,
        "folder": str(one.folder),
        "error": error,
    }


@dataclass
class _Member:
    """A run under way: its loop, and what it leaves when another one's turn comes."""

    job: Job
    adapter: Adapter
    random: Mapping[str, Tensor]
    driving: Generator[Due, Given | None, Finished]
    given: Given | None = None
    ended: Finished | OnebaseError | None = None

    @contextmanager
    def turn(self) -> Generator[None]:
        """Inside, this run's adapter is chosen and torch's random state is its own."""
        checkpoint.restore_random(self.random)
        with use(self.job.base.model, self.job.name):
            yield
        self.random = checkpoint.random_tensors()

    def advance(self) -> Due | None:
        """Go on to the next step, which is given back; None where the run has ended."""
        if self.ended is None:
            with self.turn():
                try:
                    return self.driving.send(self.given)
                except StopIteration as end:
                    self.ended = end.value
                except OnebaseError as error:
                    self.ended = error
        return None


def _train_group(
    base: Base, jobs: Sequence[Job], listener: Listener | None, stop: Callable[[], bool]
) -> dict[str, Run | OnebaseError]:
    """Train the runs of a group in step, then finish each: how they ended, by name."""
    model = base.model
    with ExitStack() as stack, torch.random.fork_rng():
        for job in jobs:
            stack.enter_context(process_lock(job.folder / LOCK, wait=False))
        proof = _Proof(hash_ahead(model).result(), memory_together(base, [job.plan for job in jobs]))
        members = [_start(job, listener, stop) for job in jobs]
        with ExitStack() as carried:
            for member in members:
                inject(model, member.adapter, member.job.name)
                carried.callback(eject, model, [member.job.name])
                carried.callback(member.driving.close)
            carried.enter_context(eval_mode(model))
            _train_in_step(model, members)
        return {member.job.name: _finished(member, proof) for member in members}


def _start(job: Job, listener: Listener | None, stop: Callable[[], bool]) -> _Member:
    """A run before its first step. Its start may look at the base, which carries no adapter yet."""
    open_folder(job.folder, job.config)
    torch.manual_seed(job.config.seed)
    adapter = first_adapter(job)
    heard = (lambda event: listener(Heard(job.name, event))) if listener else None
    return _Member(job, adapter, checkpoint.random_tensors(), drive(job, heard, stop))


def _train_in_step(model: nn.Module, members: Sequence[_Member]) -> None:
    """Run all loops to their ends, side by side. A lone one computes its steps itself."""
    engine = Engine(model, *(member.job.name for member in members)) if len(members) > 1 else None
    while waiting := [(member, due) for member in members if (due := member.advance())]:
        if engine is not None:
            _give(engine, waiting)


def _give(engine: Engine, waiting: Sequence[tuple[_Member, Due]]) -> None:
    """Give each run the gradients of its step: what `step.gradients` does, for all in one pass a batch.

    The time is shared out by tokens, so that the runs' times add up to the clock's.
    """
    started = time.perf_counter()
    targets = [sum(loss_tokens(rows) for rows in due.batches) for _, due in waiting]
    totals = [0.0] * len(waiting)
    thrift = Thrift(checkpoint=waiting[0][0].job.config.optim.recompute)
    for number in range(max(len(due.batches) for _, due in waiting)):
        at = [index for index, (_, due) in enumerate(waiting) if number < len(due.batches)]
        parts: list[Part] = []
        for member, due in (waiting[index] for index in at):
            with member.turn(), adapter_dropout(member.job.base.model):
                parts.append(engine.member(member.job.name, layout(due.batches[number], thrift.share)))
        losses = engine.joint_loss(parts, thrift.checkpoint)
        means = [loss / max(targets[index], 1) for index, loss in zip(at, losses, strict=True)]
        torch.stack(means).sum().backward()
        for index, mean in zip(at, means, strict=True):
            totals[index] += float(mean.detach())
    seconds = time.perf_counter() - started
    tokens = [sum(len(row.ids) for rows in due.batches for row in rows) for _, due in waiting]
    for (member, _), loss, count, own in zip(waiting, totals, targets, tokens, strict=True):
        member.given = Given(loss, count, seconds * own / sum(tokens))


class _Proof(NamedTuple):
    """The base's digests before the first step, and the group's estimated memory."""

    hashed: Hashed
    memory: int


def _finished(member: _Member, proof: _Proof) -> Run | OnebaseError:
    """The run's adapter and reports, written; the error where there is none."""
    job, ended = member.job, member.ended
    if isinstance(ended, OnebaseError):
        return ended
    assert ended is not None
    if ended.reason == "interrupted":
        return Run(job.folder, ended.reason, ended.progress)
    plan = replace(job.plan, running=proof.memory)
    outcome = Outcome(job.config, job.ready, plan, ended, proof.hashed)
    try:
        return Run(job.folder, ended.reason, ended.progress, *finish(job.base, job.folder, outcome))
    except OnebaseError as error:
        return error
