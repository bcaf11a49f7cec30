"""`onebase sweep`: a grid of runs on one base, their progress on one bar, and a table of what each came to."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn
from rich.progress import TimeRemainingColumn as TimeLeft
from rich.table import Table
from rich.text import Text

from onebase.cli.configs import SweepConfig
from onebase.cli.console import console, notes, say, table
from onebase.cli.train import stoppable
from onebase.config import build
from onebase.training.loop import Evaluated, Stepped
from onebase.training.report import count, duration, size
from onebase.training.sweep import RESULTS, Heard, SweepPlan, Swept, foresee_sweep, sweep


def run(options: dict[str, Any]) -> int:
    """Train the grid. Returns 130 where it was interrupted, the exit code of the first error where every run failed."""
    config: Any = build(SweepConfig, options)
    options = {name: value for name, value in options.items() if name != "together"}
    if config.plan:
        print_sweep_plan(foresee_sweep(options, config.together))
        return 0
    with SweepScreen() as screen, stoppable() as stop:
        results = sweep(None, screen, lambda: bool(stop), config.together, **options)
    print_results(results)
    say(f"results: {config.output}/{RESULTS}")
    if stop:
        notes.print(
            "interrupted, what was done is saved; the same command with --resume goes on", markup=False
        )
        return 130
    errors = [one.error for one in results if one.error]
    return errors[0].exit_code if len(errors) == len(results) else 0


def print_sweep_plan(plan: SweepPlan) -> None:
    """Every run, and what trains with what."""
    made = Table(
        "run", "trainable", "steps", "rows are scored by", "group", title="runs", title_justify="left"
    )
    for number, group in enumerate(plan.groups, 1):
        for name in group:
            one = plan.plans[name]
            made.add_row(
                Text(name, overflow="fold"), count(one.trainable), count(one.steps), one.way, str(number)
            )
    console.print(made)
    first, largest = next(iter(plan.plans.values())), max(map(len, plan.groups))
    console.print(
        table(
            "plan",
            [
                ("base", f"{size(first.base_bytes)} stored, loaded once; runs in {first.dtype}"),
                ("rows", f"{count(first.rows)} to train on, {count(first.valid_rows)} held out"),
                ("runs", f"{len(plan.plans)}, {_together(largest)}"),
                ("memory, estimated", size(plan.memory)),
            ],
        )
    )


def _together(largest: int) -> str:
    return f"up to {largest} at once" if largest > 1 else "one after the other"


class SweepScreen:
    """Listens to a sweep: prints the plan and each evaluation, and moves a bar over the steps of all runs."""

    def __init__(self) -> None:
        self._bar = Progress(
            TextColumn("steps of all runs"),
            BarColumn(),
            MofNCompleteColumn(),
            TimeElapsedColumn(),
            TextColumn("left"),
            TimeLeft(),
            console=console,
        )
        self._task: Any = None

    def __enter__(self) -> SweepScreen:
        return self

    def __exit__(self, *_: object) -> None:
        self._bar.stop()

    def __call__(self, event: SweepPlan | Heard) -> None:
        if isinstance(event, SweepPlan):
            print_sweep_plan(event)
            self._task = self._bar.add_task("sweep", total=sum(plan.steps for plan in event.plans.values()))
            self._bar.start()
        elif isinstance(event.event, Stepped):
            self._bar.advance(self._task)
        elif isinstance(event.event, Evaluated):
            step, loss = event.event.progress.step, event.event.metrics["loss"]
            say(f"{event.name}: step {step}: held-out loss {loss:.4f}")


def print_results(results: Sequence[Swept]) -> None:
    """The runs, the least held-out loss first; then what went wrong."""
    varied = list(results[0].varied)
    made = Table(
        *varied, "held-out loss", "steps", "time", "ended", "folder", title="results", title_justify="left"
    )
    for one in results:
        progress = one.run.progress if one.run else None
        made.add_row(
            *(Text(str(one.varied[name]), overflow="fold") for name in varied),
            "-" if one.loss is None else f"{one.loss:.4f}",
            count(progress.step) if progress else "-",
            duration(progress.seconds) if progress else "-",
            one.run.reason if one.run else "failed" if one.error else "not started",
            Text(str(one.folder), overflow="fold"),
        )
    console.print(made)
    for one in results:
        if one.error:
            say(f"{one.name} failed: {one.error}")
