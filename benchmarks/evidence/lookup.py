"""What tables and pictures look up in the rows."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from statistics import mean
from typing import Any, NamedTuple

from benchmarks.evidence.plan import BOTH, LORA, QUANTISED, Job, best_rate
from benchmarks.evidence.rows import Rows

Found = Mapping[str, Any]


def final_rows(rows: Rows, task: str, method: str, rate: float | None) -> list[Found]:
    """A method's finished reported runs, by seed."""
    jobs = [Job("final", task, method, rate or 0.0, seed) for seed in rows.setting.seeds]
    return [found for job in jobs if (found := rows.get(job)) is not None]


def finals_of(rows: Rows, task: str, method: str) -> list[Found]:
    return final_rows(rows, task, method, best_rate(rows, task, method))


def label_finals(rows: Rows, method: str) -> list[Found]:
    """A method's finished reported runs on the classes, by seed."""
    task = rows.setting.label_task
    rate = best_rate(rows, task, method, "label-tune") or 0.0
    jobs = [Job("label-final", task, method, rate, seed) for seed in rows.setting.seeds]
    return [found for job in jobs if (found := rows.get(job)) is not None]


def pair_finals(rows: Rows, method: str) -> list[Found]:
    """A method's finished reported runs on the vectors, by seed."""
    task = rows.setting.pair_task
    rate = best_rate(rows, task, method, "pair-tune") or 0.0
    jobs = [Job("pair-final", task, method, rate, seed) for seed in rows.setting.seeds]
    return [found for job in jobs if (found := rows.get(job)) is not None]


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


def pair(rows: Rows, task: str, figure: Callable[[Found], float]) -> Pair:
    rates = [best_rate(rows, task, method) or 0.0 for method in BOTH]
    both = [
        [rows.get(Job("final", task, method, rate, seed)) for method, rate in zip(BOTH, rates, strict=True)]
        for seed in rows.setting.seeds
    ]
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
            [rows.get(Job("final", task, name, rate, seed)) for name in (method, LORA)]
            for seed in rows.setting.seeds
        ]
        found = [one for one, _ in both if one is not None]
        losses = [one["test"][task] for one in found]
        apart = [one["test"][task] - plain["test"][task] for one, plain in both if one and plain]
        if found:
            first = found[0]
            made.append(Rounded(method, first["base_test"][task], first["stored_bytes"], losses, apart))
    return made


def other_loss(found: Found, base: Found, task: str, tasks: Sequence[str]) -> float:
    """The mean change of loss on the tasks that were not trained."""
    return mean(found["test"][other] - base["test"][other] for other in tasks if other != task)


def scarce_curve(rows: Rows, method: str, count: int) -> list[Mapping[str, float]]:
    task = rows.setting.main_task
    rate = best_rate(rows, task, method)
    found = rows.get(Job("scarce", task, method, rate or 0.0, 0, count))
    return found["curve"] if found else []


def matrix_losses(rows: Rows) -> dict[str, dict[str, float]]:
    """Adapter (none for the base) -> task -> test loss, first seed."""
    found: dict[str, dict[str, float]] = {}
    if base := rows.get(Job("base")):
        found["none"] = dict(base["test"])
    for task in rows.setting.tasks:
        rate = best_rate(rows, task, LORA)
        if row := rows.get(Job("final", task, LORA, rate or 0.0, rows.setting.seeds[0])):
            found[task] = dict(row["test"])
    return found
