"""`onebase train`: train with a screen; Ctrl-C finishes the step, saves, and exits with 130."""

from __future__ import annotations

import shlex
import signal
from collections.abc import Generator
from contextlib import contextmanager
from types import FrameType
from typing import Any

from onebase.cli.console import notes, say
from onebase.cli.screen import TrainingScreen, print_plan, print_record
from onebase.config import TrainConfig, build
from onebase.training.distributed import launched_rank
from onebase.training.run import foresee, train


def run(options: dict[str, Any]) -> int:
    """Train; returns 130 where the run was interrupted, else 0."""
    config = build(TrainConfig, options)
    leads = launched_rank() == 0  # of the processes that torchrun starts the first alone prints
    if config.plan:
        if leads:
            print_plan(*foresee(options))
        return 0
    with TrainingScreen() as screen, stoppable() as stop:
        result = train(None, screen, lambda: bool(stop), **options)
    if not leads:
        return 0 if result.record else 130
    if result.record is None:
        again = shlex.join(["onebase", "train", "--output", str(result.folder), "--resume"])
        told = f"interrupted at step {result.progress.step}, saved; go on with: {again}"
        notes.print(told, markup=False, emoji=False, highlight=False, soft_wrap=True)
        return 130
    print_record(result.record)
    say(f"adapter: {result.folder}")
    say(f"report:  {result.folder}/report.html")
    return 0


@contextmanager
def stoppable() -> Generator[list[int]]:
    """A list that gets an entry on Ctrl-C or SIGTERM; a second Ctrl-C stops at once."""
    asked: list[int] = []

    def ask(number: int, frame: FrameType | None) -> None:
        asked.append(number)
        signal.signal(signal.SIGINT, signal.default_int_handler)
        notes.print("finishing this step and saving; Ctrl-C again stops at once")

    before = {number: signal.signal(number, ask) for number in (signal.SIGINT, signal.SIGTERM)}
    try:
        yield asked
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
