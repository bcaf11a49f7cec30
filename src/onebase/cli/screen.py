"""What commands print: the plan before training, the bar during it, the summary after it."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

from rich.progress import (
    BarColumn,
    MofNCompleteColumn,
    Progress,
    TextColumn,
    TimeElapsedColumn,
    TimeRemainingColumn,
)
from rich.table import Table
from rich.text import Text

from onebase.adapters.targets import CoverageRow
from onebase.cli.console import console, say, table
from onebase.training.loop import Evaluated, Event, Finished, Saved, Stepped
from onebase.training.plan import Plan
from onebase.training.record import RunRecord
from onebase.training.report import changes, count, duration, plain, size, wording
from onebase.training.speed import Prediction


def coverage_table(rows: Iterable[CoverageRow]) -> Table:
    """Which modules get an update, in which layers."""
    made = Table(
        "target", "modules", "layers", "in → out", "rank", "scale", title="adapted", title_justify="left"
    )
    for row in rows:
        shape = f"{row.shape[0]} → {row.shape[1]}"
        made.add_row(
            Text(row.target, overflow="fold"),
            str(row.modules),
            row.layers or "-",
            shape,
            str(row.rank),
            f"{row.scale:g}",
        )
    return made


def print_plan(plan: Plan, prediction: Prediction | None = None) -> None:
    """What the run is going to be, and how long it may take."""
    console.print(coverage_table(plan.coverage))
    console.print(
        table(
            "plan",
            [
                (
                    "trainable parameters",
                    f"{count(plan.trainable)} of {count(plan.total)} ({plan.share:.2%})",
                ),
                *([("token rows", "; ".join(plan.token_rows))] if plan.token_rows else []),
                ("base", f"{size(plan.base_bytes)} stored; runs in {plan.dtype}"),
                ("rows", f"{count(plan.rows)} to train on, {count(plan.valid_rows)} held out"),
                (
                    "tokens in one pass",
                    f"{count(plan.tokens)}, for {count(plan.loss_tokens)} {plan.kind}"
                    if plan.kind != "text"
                    else f"{count(plan.tokens)}, of which {count(plan.loss_tokens)} carry loss",
                ),
                *([("labels", plain(plan.labels))] if plan.labels else []),
                ("optimiser steps", count(plan.steps)),
                ("learning rate, at its peak", f"{plan.lr:.3g}"),
                ("rows are scored by", plan.way),
                ("memory, estimated", size(plan.memory)),
                *(_times(prediction) if prediction else []),
            ],
        )
    )


def _times(prediction: Prediction) -> list[tuple[str, str]]:
    """The run's seconds, and the parts that take most of them."""
    parts = sorted(prediction.parts.items(), key=lambda part: -part[1])
    shares = ", ".join(f"{name} {seconds / prediction.seconds:.0%}" for name, seconds in parts[:4])
    return [("time, predicted", duration(prediction.seconds)), ("of which", shares)]


class TrainingScreen:
    """Listens to a run: prints the plan, moves a bar, and keeps quiet where there is no terminal."""

    def __init__(self) -> None:
        self._bar = Progress(
            TextColumn("{task.description}"),
            BarColumn(),
            MofNCompleteColumn(),
            TextColumn("loss {task.fields[loss]}"),
            TextColumn("{task.fields[speed]} tokens/s"),
            TimeElapsedColumn(),
            TextColumn("left"),
            TimeRemainingColumn(),
            console=console,
        )
        self._task: Any = None
        self._total = 0

    def __enter__(self) -> TrainingScreen:
        return self

    def __exit__(self, *_: object) -> None:
        if self._task is not None:
            self._bar.stop()

    def __call__(self, event: Plan | Event) -> None:
        match event:
            case Plan():
                print_plan(event)
                self._total = event.steps
            case Stepped():
                self._step(event)
            case Evaluated():
                best = " (best)" if event.progress.best_step == event.progress.step else ""
                console.print(f"step {event.progress.step}: held-out loss {event.metrics['loss']:.4f}{best}")
            case Saved():
                say(f"step {event.progress.step}: saved {event.folder}")
            case Finished():
                self._bar.stop()

    def _step(self, event: Stepped) -> None:
        metrics = event.metrics
        shown: dict[str, Any] = {
            "loss": f"{metrics['loss']:.4f}",
            "speed": f"{metrics['tokens_per_second']:.0f}",
        }
        if self._task is None:
            self._task = self._bar.add_task(
                "train", total=self._total, completed=event.progress.step - 1, **shown
            )
            self._bar.start()
        self._bar.update(self._task, completed=event.progress.step, **shown)
        done, total = event.progress, self._total
        if not console.is_terminal and (done.step % max(1, total // 20) == 0 or done.step in (3, total)):
            left = duration(done.seconds / done.step * (total - done.step))
            say(f"step {done.step}/{total} loss {shown['loss']} {shown['speed']} tokens/s, {left} left")


def print_record(record: RunRecord) -> None:
    """What a run came to."""
    rows = [
        ("ended", record.finished),
        ("time", f"{duration(record.timing.seconds)}, {record.timing.tokens_per_second:.0f} tokens/s"),
        (
            "memory at its peak",
            f"{size(record.memory.peak_bytes)} (estimated {size(record.memory.predicted_bytes)})",
        ),
        ("adapter", f"{size(record.adapter.file_bytes)} beside a base of {size(record.base.stored_bytes)}"),
        ("base unchanged", f"verified: {record.proof.tensors} tensors, {record.proof.after[:23]}..."),
    ]
    if record.before and record.after:
        rows[1:1] = _results(record)
        if record.before.exact_match is not None and record.after.exact_match is not None:
            change = f"{record.before.exact_match:.0%} -> {record.after.exact_match:.0%}"
            rows.insert(2, ("exact match", f"{change} of {len(record.samples)} held-out answers"))
    console.print(table("result", rows))


def _results(record: RunRecord) -> list[tuple[str, str]]:
    """What training changed on the held-out rows: the loss; for labels and vectors each measure of the task."""
    assert record.before is not None
    assert record.after is not None
    if not record.head and not record.embedder:
        return [("held-out loss", f"{record.before.loss:.4f} -> {record.after.loss:.4f}")]
    words, shown = wording(record), list[tuple[str, str]]()
    for label, before, after, unit, _ in changes(record.before, record.after, words):
        one, two = (
            f"{value:.1f}%" if unit == "%" else f"{value:.4f} {unit}".strip() for value in (before, after)
        )
        shown.append((label.lower(), f"{two} ({words.before}: {one})"))
    return shown
