"""What tables and pictures look up in the rows."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from statistics import mean
from typing import Any, NamedTuple

from benchmarks.evidence.plan import BOTH, LONG, LORA, QUANTISED, SHORT, Job, Leg, best_rate
from benchmarks.evidence.rows import Rows

Found = Mapping[str, Any]


def final_rows(rows: Rows, task: str, method: str, leg: Leg = SHORT) -> list[Found | None]:
    """A method's reported runs by seed, None for one that was not run."""
    rate = best_rate(rows, task, method, leg) or 0.0
    return [rows.get(Job(leg.final, task, method, rate, seed)) for seed in rows.setting.seeds]


def finals_of(rows: Rows, task: str, method: str, leg: Leg = SHORT) -> list[Found]:
    """A method's finished reported runs."""
    return [found for found in final_rows(rows, task, method, leg) if found is not None]


def main_losses(rows: Rows, methods: Iterable[str]) -> dict[str, list[float]]:
    """Each method's held-out loss of the main task, by seed; nothing where one of them has not got every seed."""
    task = rows.setting.main_task
    found = {method: finals_of(rows, task, method) for method in methods}
    whole = all(len(one) == len(rows.setting.seeds) for one in found.values())
    return {method: [run["test"][task] for run in one] for method, one in found.items()} if whole else {}


def step_runs(rows: Rows, side: str, dtype: str) -> list[Found]:
    jobs = [
        Job("step", rows.setting.main_task, f"{side} {dtype}", seed=run)
        for run in range(rows.setting.timed_runs)
    ]
    return [found for job in jobs if (found := rows.get(job)) is not None]


class Pair(NamedTuple):
    """A figure of LoRA and of full fine-tuning on the seeds that both have."""

    lora: list[float]
    full: list[float]

    @property
    def differences(self) -> list[float]:
        return [a - b for a, b in zip(self.lora, self.full, strict=True)]


def pair(rows: Rows, task: str, figure: Callable[[Found], float], leg: Leg = SHORT) -> Pair:
    both = zip(*(final_rows(rows, task, method, leg) for method in BOTH), strict=True)
    whole = [(a, b) for a, b in both if a is not None and b is not None]
    return Pair([figure(a) for a, _ in whole], [figure(b) for _, b in whole])


class Rounded(NamedTuple):
    """What LoRA gave on a rounded base: losses by seed, and how far from those on the plain base with the same seed."""

    method: str
    base: float
    stored_bytes: float
    losses: list[float]
    apart: list[float]


def rounded_runs(rows: Rows) -> list[Rounded]:
    task, made = rows.setting.main_task, list[Rounded]()
    rate = best_rate(rows, task, LORA) or 0.0
    for method in QUANTISED:
        both = [
            [rows.get(Job(SHORT.final, task, name, rate, seed)) for name in (method, LORA)]
            for seed in rows.setting.seeds
        ]
        found = [one for one, _ in both if one is not None]
        losses = [one["test"][task] for one in found]
        apart = [one["test"][task] - plain["test"][task] for one, plain in both if one and plain]
        if found:
            first = found[0]
            made.append(Rounded(method, first["base_test"][task], first["stored_bytes"], losses, apart))
    return made


def others(rows: Rows, task: str, leg: Leg) -> Pair:
    """The mean change of loss on the tasks that were not trained, of both methods."""
    if not (base := rows.get(Job(leg.base))):
        return Pair([], [])
    return pair(rows, task, lambda f: other_loss(f, base, task, rows.setting.tasks), leg)


def other_loss(found: Found, base: Found, task: str, tasks: Sequence[str]) -> float:
    """The mean change of loss on the tasks that were not trained."""
    return mean(found["test"][other] - base["test"][other] for other in tasks if other != task)


class Scarce(NamedTuple):
    """A run on few rows by what it came to: losses in nats, the step of the best one."""

    learnt: float
    held_out: float
    best: float
    step: float

    @property
    def rise(self) -> float:
        """How far the held-out loss rose after its best."""
        return self.held_out - self.best


def scarce_curves(rows: Rows, method: str, count: int) -> list[list[Mapping[str, float]]]:
    """The curve of each seed: step, loss on learnt rows, loss on held-out ones."""
    task, rate = rows.setting.main_task, best_rate(rows, rows.setting.main_task, method) or 0.0
    jobs = [Job("scarce", task, method, rate, seed, count) for seed in rows.setting.seeds]
    return [found["curve"] for job in jobs if (found := rows.get(job)) is not None]


def scarce_runs(rows: Rows, method: str, count: int) -> list[Scarce]:
    made: list[Scarce] = []
    for curve in scarce_curves(rows, method, count):
        best, last = min(curve, key=lambda point: point["test"]), curve[-1]
        made.append(Scarce(last["train"], last["test"], best["test"], best["step"]))
    return made


def matrix_losses(rows: Rows) -> dict[str, dict[str, float]]:
    """Adapter (none for the base) -> task -> test loss, first seed of the longer runs."""
    found: dict[str, dict[str, float]] = {}
    if base := rows.get(Job(LONG.base)):
        found["none"] = dict(base["test"])
    for task in rows.setting.tasks:
        if row := final_rows(rows, task, LORA, LONG)[0]:
            found[task] = dict(row["test"])
    return found
