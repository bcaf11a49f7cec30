"""`train`: from options to a proven adapter in a run folder, or to a checkpoint from which to go on."""

from __future__ import annotations

from collections.abc import Callable, Generator, Mapping
from concurrent.futures import Future
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
import yaml

from onebase.adapters.adapter import HEAD_TASK, VECTOR_TASK, Adapter, Origin
from onebase.adapters.injection import adapter_for, eject, eval_mode, inject, trainable, use
from onebase.config import TrainConfig, build, flatten
from onebase.data.pack import prompt_groups
from onebase.errors import ConfigError, FormatError, MissingFile, OutputExists
from onebase.files import process_lock, remove, require_writable, write_text
from onebase.models.base import Base, load_base
from onebase.models.scoring import Kept, Thrift, scorer
from onebase.tasks import EMBED
from onebase.training import checkpoint
from onebase.training.calibrate import calibrate
from onebase.training.checkpoint import Progress, Snapshot
from onebase.training.distributed import Hashed, World, hash_ahead, joined, shard, spread
from onebase.training.finish import Outcome, finish
from onebase.training.forecast import forecast
from onebase.training.loggers import open_loggers, require_loggers
from onebase.training.loop import NAME, Due, Evaluated, Event, Finished, Session, Stepped, run_loop
from onebase.training.optim import learned, make_optimizer, restore_optimizer
from onebase.training.plan import Plan, make_plan
from onebase.training.prepare import Data, Prepared, prepare, settled, with_lr, with_task
from onebase.training.record import MetricsFile, RunRecord
from onebase.training.speed import Prediction
from onebase.training.step import Given
from onebase.training.warmstart import with_start

OPTIONS, METRICS, LOCK = "train.yaml", "metrics.jsonl", ".lock"

# What a run puts into its folder: the only names that --overwrite deletes.
RUN_FILES = (
    OPTIONS,
    METRICS,
    checkpoint.FOLDER,
    "adapter_config.json",
    "adapter_model.safetensors",
    "onebase.json",
    "run.json",
    "report.html",
    "curves.png",
    "README.md",
    "tensorboard",
)
# Kind of the base -> PEFT's task_type.
TASKS = {"causal": "CAUSAL_LM", "classifier": HEAD_TASK, "embedder": VECTOR_TASK}

# What may differ between a run and its resumption: where things are, what is shown. Content is compared by digest.
FREE = frozenset(
    "resume overwrite plan log keep samples output data validation base dtype shard_base".split()
)

Listener = Callable[[Plan | Event], None]


@dataclass(frozen=True)
class Run:
    """A run that ended. `adapter` and `record` are None where it was interrupted: resume it to get them."""

    folder: Path
    reason: str  # completed, early or interrupted
    progress: Progress
    adapter: Adapter | None = None
    record: RunRecord | None = None


def train(
    base: Base | str | None = None,
    /,
    listener: Listener | None = None,
    stop: Callable[[], bool] = lambda: False,
    **options: Any,
) -> Run:
    """Train an adapter; `options` are those of TrainConfig, flat: `data="rows.jsonl", output="runs/a", rank=8`.

    The output folder gets the adapter (PEFT's format), checkpoints, metrics.jsonl, curves.png, report.html and
    a model card. `listener` gets the Plan and then every Event; once `stop()` is true the step in hand is
    finished and saved. Raises OnebaseError before anything is written if the data, the targets or the base are
    not right, and Diverged where the loss is not finite. Under torchrun all processes train one adapter: the first
    alone writes and calls `listener`, and `stop` is heard from each (docs/training.md).
    """
    base = options.pop("base", base)  # by position, or by name as any other option
    if base is not None:
        options["base"] = base.ref if isinstance(base, Base) else str(base)
    config = read_config(options)
    with joined() as world:
        snapshot = claim(config)
        _check_shard(config, world, base)
        _check_alone(config, world)
        if not isinstance(base, Base):
            base = _agreed_base(config, snapshot, world)
        base, data = with_task(base, config)
        hashed = hash_ahead(base.model)
        job = replace(make_job(base, config, snapshot, data), world=world)
        # Only once every process has found the folder free does the first one write to it.
        world.agree({**job.facts, "checkpoint": snapshot.progress.step if snapshot else 0})
        if not world.leads:
            with torch.random.fork_rng():
                return _train(job, hashed, None, stop)
        if listener:
            listener(job.plan)
        with process_lock(job.folder / LOCK, wait=False), torch.random.fork_rng():
            open_folder(job.folder, job.config)
            return _train(job, hashed, listener, stop)


def _check_shard(config: TrainConfig, world: World, base: Base | str | None) -> None:
    whole = [name for name in ("trainable_tokens", "modules_to_save") if getattr(config.lora, name)]
    problems = {
        "there is one process": world.size == 1,
        "a base that was loaded before would stay in parts": isinstance(base, Base),
        f"{' and '.join(whole)} need whole weights": bool(whole),
    }
    found = "; ".join(problem for problem, applies in problems.items() if applies)
    if config.shard_base and found:
        hint = "torchrun --nproc-per-node 2 -m onebase train --shard-base ..., with the base by its name"
        raise ConfigError("option shard_base", found, hint=hint)


def _check_alone(config: TrainConfig, world: World) -> None:
    reasons: dict[str, str] = {}
    if config.data.task == EMBED:
        reasons["task=embed"] = (
            "each would see a part of the batch, and a pair's loss is that of the whole one"
        )
    if config.optim.cache_activations:
        reasons["cache_activations"] = "the states are kept in one process's file"
    if reasons and world.size > 1:
        option, reason = next(iter(reasons.items()))
        hint = "train in one process, without torchrun"
        raise ConfigError(f"option {option}", f"{world.size} processes: {reason}", hint=hint)


def _agreed_base(config: TrainConfig, snapshot: Snapshot | None, world: World) -> Base:
    """The base in the first process's dtype: a choice by speed may come out otherwise in another process."""
    first = base_for(config, snapshot) if world.leads else None
    dtype = world.first_says(first.dtype if first else "")
    return first or load_base(config.base, dtype)


def foresee(options: Mapping[str, Any]) -> tuple[Plan, Prediction | None]:
    """What `train` with these options would do, and the time it would take here; nothing is written.

    The prediction is None where the base is of a kind whose work cannot be counted.
    """
    config = build(TrainConfig, with_start(options))
    if not config.data.data:
        raise ConfigError("option data", "is empty: training needs rows", hint="--data rows.jsonl")
    base, data = with_task(load_base(config.base, config.dtype), config)
    job = make_job(base, config, None, data)
    return job.plan, forecast(base, job.config, job.ready, job.plan)


def read_config(options: Mapping[str, Any]) -> TrainConfig:
    """The options as a config; with resume, the run folder's own options unless they are given again."""
    if not options.get("resume"):
        config = build(TrainConfig, with_start(options))
    else:
        stored = _stored_options(Path(options.get("output") or "."))
        before = build(TrainConfig, stored)
        given = {**stored, **options, "overwrite": options.get("overwrite", False)}
        config = with_lr(build(TrainConfig, given), before.optim.lr)
        _check_same(_fixed(before), _fixed(config))
    if not config.data.data:
        raise ConfigError("option data", "is empty: training needs rows", hint="--data rows.jsonl")
    if not config.output:
        raise ConfigError("option output", "is empty", hint="name a folder for the run: --output runs/first")
    return config


def _stored_options(folder: Path) -> dict[str, Any]:
    path = folder / OPTIONS
    if not path.is_file():
        raise MissingFile(f"resume {folder}", f"no {OPTIONS} there, so no run to resume")
    try:
        return dict(yaml.safe_load(path.read_text(encoding="utf-8")))
    except (yaml.YAMLError, TypeError, ValueError) as error:
        raise FormatError(f"resume {folder}", f"its {OPTIONS} is broken: {error}") from error


def claim(config: TrainConfig) -> Snapshot | None:
    """Where a resumed run goes on, None for a new one; an error where the run may not use its folder or loggers.

    Called first, so that no work is lost.
    """
    folder = _claimed(config)
    require_loggers(config.log)  # pyright: ignore[reportArgumentType]
    return _last(folder) if config.resume else None


def base_for(config: TrainConfig, snapshot: Snapshot | None) -> Base:
    """The run's base; a resumed run's in the dtype that it had."""
    return load_base(config.base, snapshot.facts["dtype"] if snapshot else config.dtype)


def _claimed(config: TrainConfig) -> Path:
    folder = Path(config.output).expanduser()
    if folder.exists() and not folder.is_dir():
        raise OutputExists(f"output {folder}", "it is a file")
    require_writable(folder / OPTIONS)
    if config.resume or not folder.is_dir() or all(item.name == LOCK for item in folder.iterdir()):
        return folder
    if not (folder / OPTIONS).is_file():
        raise OutputExists(
            f"output {folder}", "it is not empty and holds no run", hint="choose another folder"
        )
    if not config.overwrite:
        hint = "--resume goes on with it, --overwrite deletes it"
        raise OutputExists(f"output {folder}", "it already holds a run", hint=hint)
    return folder


def _last(folder: Path) -> Snapshot | None:
    """The newest checkpoint; None where the run was stopped before its first."""
    found = checkpoint.checkpoints(folder)
    return checkpoint.load(found[-1]) if found else None


def _facts(base: Base, config: TrainConfig, ready: Prepared) -> dict[str, Any]:
    """What must be the same for a resumed run to equal an uninterrupted one."""
    return {
        **_fixed(config),
        "dtype": base.dtype,
        "base fingerprint": base.fingerprint,
        "data digest": ready.data.digest,
        "way": ready.way.name,
    } | ({"start digest": ready.start.facts["digest"]} if ready.start else {})


def _fixed(config: TrainConfig) -> dict[str, Any]:
    return {name: value for name, value in flatten(config).items() if name not in FREE}


def _check_same(before: Mapping[str, Any], now: Mapping[str, Any]) -> None:
    differing = [name for name in {**before, **now} if before.get(name) != now.get(name)]
    if differing:
        told = "; ".join(
            f"{name} was {before.get(name)!r}, is {now.get(name)!r}" for name in sorted(differing)
        )
        raise ConfigError(
            "resume", told, hint="a resumed run must equal an uninterrupted one: restore these, or start anew"
        )


def open_folder(folder: Path, config: TrainConfig) -> None:
    """Make the folder ready: a run to be overwritten goes, and so does what a kill left half-written."""
    for name in RUN_FILES if config.overwrite else ():
        remove(folder / name)
    for leftover in [*folder.glob(".*.tmp"), *(folder / checkpoint.FOLDER).glob(".*.tmp")]:
        remove(leftover)
    if not (config.resume and (folder / OPTIONS).is_file()):
        write_text(folder / OPTIONS, yaml.safe_dump({**flatten(config), "overwrite": False}, sort_keys=False))


@dataclass(frozen=True)
class Job:
    """A run that may start."""

    base: Base
    config: TrainConfig
    ready: Prepared
    plan: Plan
    folder: Path
    snapshot: Snapshot | None  # where a resumed run goes on
    facts: Mapping[str, Any]
    name: str = NAME  # the adapter's on the model
    world: World = World()


def make_job(base: Base, config: TrainConfig, snapshot: Snapshot | None, data: Data | None = None) -> Job:
    """Check everything before the first step; base and rows (where they have been read) as `with_task` gives them."""
    config = settled(base, config)
    ready = prepare(base, config, data)
    facts = _facts(base, config, ready)
    if snapshot:
        _check_same(snapshot.facts, facts)
    plan = make_plan(base, config, ready)
    return Job(base, config, ready, plan, Path(config.output).expanduser(), snapshot, facts)


def _train(job: Job, hashing: Future[Hashed], listener: Listener | None, stop: Callable[[], bool]) -> Run:
    torch.manual_seed(job.config.seed)
    model, hashed = job.base.model, hashing.result()
    adapter = first_adapter(job)
    if job.config.shard_base:
        shard(model, job.world)
    inject(model, adapter, job.name)
    try:
        with eval_mode(model), use(model, job.name):
            ended = _to_its_end(drive(job, listener, stop))
    finally:
        eject(model, [job.name])
    if ended.reason == "interrupted":
        return Run(job.folder, ended.reason, ended.progress)
    adapter, record = finish(
        job.base, job.folder, Outcome(job.config, job.ready, job.plan, ended, hashed, job.world)
    )
    return Run(job.folder, ended.reason, ended.progress, adapter, record)


def _to_its_end(driving: Generator[Due, Given | None, Finished]) -> Finished:
    while True:
        try:
            next(driving)
        except StopIteration as end:
            return end.value


def first_adapter(job: Job) -> Adapter:
    """The checkpoint's adapter in a resumed run, else the one that the run goes on from, or a fresh one."""
    if job.snapshot:
        return job.snapshot.adapter
    task, words = TASKS.get(job.base.kind, ""), job.ready.words
    reader = job.base.reader
    form = {} if reader else job.ready.data.form.as_dict()
    told = reader.as_dict() if reader else {}
    origin = Origin(job.base.name, job.base.fingerprint, task, form, tokens=words.new, head=told)
    if job.ready.start:
        adapter = replace(job.ready.start.adapter, origin=origin)
    else:
        lora = replace(job.config.lora, trainable_tokens=words.names)
        seen = calibrate(job.base, job.config, job.ready)
        adapter = adapter_for(job.base.model, job.ready.coverage, lora, job.config.seed, origin, seen)
    job.world.copy_first(adapter.tensors().values())
    return adapter


def _session(job: Job) -> Session:
    config = job.config
    parameters = learned(trainable(job.base.model, job.name), config.optim)
    for parameter in parameters.values():
        parameter.requires_grad_(True)
    optimizer = make_optimizer(parameters, config.optim)
    score = scorer(job.base, job.ready.way, job.name, _thrift(job))
    if job.snapshot:
        restore_optimizer(optimizer, parameters, job.snapshot.tensors)
        checkpoint.restore_random(job.snapshot.tensors)
    return Session(
        model=job.base.model,
        parameters=parameters,
        optimizer=optimizer,
        train_rows=job.ready.data.train_rows.rows,
        valid_rows=job.ready.data.valid_rows.rows,
        score=spread(score, job.world),
        groups=prompt_groups(job.ready.data.train_rows.rows) if config.optim.group_prompts else (),
        config=config.optim,
        seed=config.seed,
        folder=job.folder,
        facts=job.facts,
        check_unused="unused-adapter" not in config.data.allowed,
        name=job.name,
        world=job.world,
    )


def _thrift(job: Job) -> Thrift:
    data, optim = job.ready.data, job.config.optim
    kept = Kept([*data.train_rows.rows, *data.valid_rows.rows], job.folder)
    return Thrift(checkpoint=optim.recompute, kept=kept if optim.cache_activations else None)


def drive(
    job: Job, listener: Callable[[Event], None] | None, stop: Callable[[], bool]
) -> Generator[Due, Given | None, Finished]:
    """Run the loop of a job whose adapter is on the model, writing metrics down and passing events on.

    Stops at each step that is Due, as the loop does, and returns the last event.
    """
    session, config = _session(job), job.config
    progress = job.snapshot.progress if job.snapshot else Progress()
    metrics = MetricsFile(session.folder / METRICS)
    writes = job.world.leads
    if writes:
        metrics.truncate_after(progress.step if progress.step else -1)
    names: Any = config.log if writes else ()
    with open_loggers(names, session.folder, flatten(config), progress.step + 1) as loggers:
        loop, given = run_loop(session, progress, stop), None
        while True:
            event, given = loop.send(given), None
            if isinstance(event, Due):
                given = yield event
                continue
            if writes and isinstance(event, Stepped | Evaluated):
                metrics.append(event.metrics)
                loggers.log(event.metrics, event.progress.step)
            if listener:
                listener(event)
            if isinstance(event, Finished):
                return event
