"""The training loop: a generator of events that knows nothing of screens, reports or the command line."""

from __future__ import annotations

import time
from collections.abc import Callable, Generator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import nn

from onebase.adapters.injection import adapter_dropout, extract
from onebase.config import OptimConfig
from onebase.data.pack import step_rows, steps_per_epoch
from onebase.data.template import Encoded
from onebase.errors import Diverged
from onebase.evaluation import mean_loss
from onebase.models.scoring import Scorer
from onebase.training import checkpoint
from onebase.training.checkpoint import Progress, Snapshot
from onebase.training.distributed import World
from onebase.training.optim import lr_factor, optimizer_tensors, set_lr
from onebase.training.step import Given, StepResult, apply_gradients, check_used, train_step

NAME = "train"  # the adapter's name on the model while it is trained


@dataclass(frozen=True)
class Stepped:
    """An optimiser step was done; `metrics` is a line of metrics.jsonl."""

    progress: Progress
    metrics: Mapping[str, Any]


@dataclass(frozen=True)
class Evaluated:
    """The held-out rows were scored."""

    progress: Progress
    metrics: Mapping[str, Any]


@dataclass(frozen=True)
class Saved:
    """A checkpoint was written."""

    progress: Progress
    folder: Path


@dataclass(frozen=True)
class Finished:
    """The loop ended: `completed`, `early` (no improvement) or `interrupted`."""

    progress: Progress
    reason: str


Event = Stepped | Evaluated | Saved | Finished


@dataclass(frozen=True)
class Due:
    """A step comes next. Who computes its gradients elsewhere adds them to the parameters' and sends a `Given`."""

    batches: Sequence[Sequence[Encoded]]


@dataclass(frozen=True)
class Session:
    """What does not change during a run."""

    model: nn.Module
    parameters: Mapping[str, nn.Parameter]
    optimizer: torch.optim.Optimizer
    train_rows: Sequence[Encoded]
    valid_rows: Sequence[Encoded]
    score: Scorer
    groups: tuple[int, ...]  # a number for each row, alike where rows should meet; empty: as they come
    config: OptimConfig
    seed: int
    folder: Path
    facts: Mapping[str, Any]
    check_unused: bool
    name: str = NAME  # the adapter's on the model
    world: World = World()  # of several processes, `score` gives the loss of this one's share

    @property
    def epoch_steps(self) -> int:
        """Optimiser steps in one pass over the training rows."""
        return steps_per_epoch(len(self.train_rows), self.config.batch_size, self.config.accumulate)

    @property
    def total_steps(self) -> int:
        """Optimiser steps of the whole run."""
        return total_steps(len(self.train_rows), self.config)


def total_steps(rows: int, config: OptimConfig) -> int:
    """How many optimiser steps a run over this many rows takes."""
    by_epochs = max(1, round(config.epochs * steps_per_epoch(rows, config.batch_size, config.accumulate)))
    return min(config.max_steps, by_epochs) if config.max_steps else by_epochs


def run_loop(
    session: Session, progress: Progress, stop: Callable[[], bool]
) -> Generator[Event | Due, Given | None, None]:
    """Train from `progress` on. Once `stop()` is true the step in hand is finished and saved.

    Iterated, it computes each step itself, and each Due may be passed over. Raises Diverged with the step, the rows
    and what to try, leaving the last checkpoint as it is.
    """
    total, config = session.total_steps, session.config
    if progress.step == 0 and session.valid_rows:
        yield (event := _evaluate(session, progress))
        progress = event.progress
    while progress.step < total and not _given_up(progress, config):
        event = yield from _step(session, progress)
        progress = event.progress
        yield event
        if session.valid_rows and _due(progress.step, config.eval_every or session.epoch_steps, total):
            yield (event := _evaluate(session, progress))
            progress = event.progress
        wanted, early = session.world.any(stop()), _given_up(progress, config)
        every = config.save_every or config.eval_every or session.epoch_steps
        if wanted or early or progress.best_step == progress.step or _due(progress.step, every, total):
            yield _save(session, progress)
        if wanted and not early and progress.step < total:
            yield Finished(progress, "interrupted")
            return
    yield Finished(progress, "completed" if progress.step == total else "early")


def _given_up(progress: Progress, config: OptimConfig) -> bool:
    return bool(config.patience) and progress.worse >= config.patience


def _due(step: int, every: int, total: int) -> bool:
    return step % every == 0 or step == total


def _step(session: Session, progress: Progress) -> Generator[Due, Given | None, Stepped]:
    config = session.config
    batches = step_rows(
        len(session.train_rows),
        config.batch_size,
        config.accumulate,
        session.seed,
        progress.step,
        session.groups,
    )
    lr = set_lr(session.optimizer, lr_factor(progress.step, session.total_steps, config))
    rows = [[session.train_rows[index] for index in batch] for batch in batches]
    session.optimizer.zero_grad(set_to_none=True)
    session.world.reseed(session.seed, progress.step)
    given = yield Due(rows)
    started = time.perf_counter() - (given.seconds if given else 0.0)
    try:
        result = _learn(session, rows, given)
    except Diverged as error:
        numbers = [row.row for batch in rows for row in batch]
        raise Diverged(
            f"step {progress.step + 1}", f"{error.found}; rows {numbers}", hint=_advice(session)
        ) from error
    if progress.step == 0 and session.check_unused:
        check_used(session.parameters)
    seconds = time.perf_counter() - started
    done = replace(
        progress,
        step=progress.step + 1,
        tokens=progress.tokens + result.tokens,
        seconds=progress.seconds + seconds,
    )
    metrics = {
        "kind": "step",
        "step": done.step,
        "epoch": round(done.step / session.epoch_steps, 4),
        "loss": result.loss,
        "lr": lr,
        "grad_norm": result.grad_norm,
        "tokens": result.loss_tokens,
        "tokens_seen": done.tokens,
        "seconds": round(seconds, 4),
        "tokens_per_second": round(result.tokens / seconds, 1),
    }
    return Stepped(done, metrics)


def _learn(session: Session, rows: Sequence[Sequence[Encoded]], given: Given | None) -> StepResult:
    """A step of the optimiser, with the gradients that were given or those of these batches."""
    clip = session.config.clip
    if given is None:
        with adapter_dropout(session.model):
            return train_step(
                session.score.loss, session.parameters, session.optimizer, rows, clip, session.world
            )
    norm = apply_gradients(session.parameters, session.optimizer, given.loss, clip)
    return StepResult(given.loss, norm, given.targets, sum(len(row.ids) for batch in rows for row in batch))


def _advice(session: Session) -> str:
    saved = checkpoint.checkpoints(session.folder)
    last = f"the last good checkpoint is {saved[-1]}" if saved else "no checkpoint was written before it"
    return (
        f"{last}; try a lower --lr, a longer --warmup, --clip 1, or look at these rows with `onebase preview`"
    )


def _evaluate(session: Session, progress: Progress) -> Evaluated:
    started = time.perf_counter()
    part, tokens = mean_loss(session.score, session.valid_rows, session.config.batch_size)
    loss = session.world.total(part)
    metrics = {
        "kind": "eval",
        "step": progress.step,
        "loss": loss,
        "tokens": tokens,
        "seconds": round(time.perf_counter() - started, 4),
    }
    return Evaluated(progress.after_eval(loss), metrics)


def _save(session: Session, progress: Progress) -> Saved:
    """A checkpoint, written by the first process alone."""
    if session.world.leads:
        checkpoint.save(session.folder, _snapshot(session, progress), session.config.keep)
    return Saved(progress, checkpoint.folder_of(session.folder, progress.step))


def _snapshot(session: Session, progress: Progress) -> Snapshot:
    tensors = optimizer_tensors(session.optimizer, session.parameters) | checkpoint.random_tensors()
    return Snapshot(extract(session.model, session.name), progress, tensors, session.facts)
