"""The page's tables, each a function of the rows alone. What was not run is said to be."""

from __future__ import annotations

from collections.abc import Callable
from statistics import mean, median

from benchmarks.evidence.lookup import (
    finals_of,
    matrix_losses,
    others,
    rounded_runs,
    scarce_runs,
    step_runs,
)
from benchmarks.evidence.plan import (
    FULL,
    LORA,
    METHODS,
    STEP_SIDES,
    Job,
    best_rate,
    legs,
    variants,
)
from benchmarks.evidence.rows import Rows
from benchmarks.evidence.tasks import METRICS, TASKS
from benchmarks.evidence.text import MISSING, NAMES, markdown, megabytes, rate_text, spread, verdict

SIDES = {
    "engine": "LoRA, onebase's engine",
    "packed": "LoRA, the model's own layers",
    "full": "full fine-tuning, the model's own layers",
}


# -- 1


def fixed(rows: Rows) -> str:
    """What became of the base in every training run that stands in the rows."""
    made = [row for row in rows.valid() if "changed" in row["found"]]
    lines = []
    for name, full in (("LoRA", False), ("full fine-tuning", True)):
        found = [row["found"] for row in made if (METHODS[row["method"]].lora is None) == full]
        if found:
            tensors, changed = sorted({f["tensors"] for f in found}), [f["changed"] for f in found]
            same = "-" if full else f"{sum(f['off_equal'] for f in found)} of {len(found)}"
            gone = "-" if full else f"{sum(f['ejected_equal'] for f in found)} of {len(found)}"
            told = f"{min(changed)}" if min(changed) == max(changed) else f"{min(changed)} to {max(changed)}"
            lines.append((name, str(len(found)), ", ".join(map(str, tensors)), told, same, gone))
    head = (
        "runs of",
        "runs",
        "tensors of the base",
        "changed by training",
        "off: the base's logits, to the bit",
        "taken off: the same",
    )
    return markdown(head, lines)


# -- 2


def sizes(rows: Rows) -> str:
    names = {f"rank {r}": f"rank-{r}" if r != 16 else LORA for r in rows.setting.ranks} | {
        "all weights": FULL
    }
    lines = []
    for name, method in names.items():
        if found := rows.get(Job("sizes", method=method)):
            share = 100 * found["trained"] / found["total"]
            counts = (f"{found['trained']:,}", f"{share:.2f} %")
            lines.append(
                (name, *counts, *(megabytes(found[part]) for part in ("gradients", "optimizer", "file")))
            )
    return markdown(
        ("trained", "values", "of the base's", "gradients, MB", "optimiser state, MB", "file, MB"), lines
    )


# -- 3


def costs(rows: Rows) -> str:
    lines = []
    for dtype in ("bfloat16", "float32"):
        found = {side: step_runs(rows, side, dtype) for side in STEP_SIDES}
        full = found["full"]
        for side, runs in found.items():
            if not runs:
                continue
            second, memory = (median(run[name] for run in runs) for name in ("seconds", "memory"))
            ratio = f"{second / median(r['seconds'] for r in full):.2f}" if full else MISSING
            by_flop = f"{runs[0]['flop'] / full[0]['flop']:.2f}" if full else MISSING
            lines.append(
                (
                    f"{SIDES[side]}, {dtype}",
                    f"{second:.2f}",
                    f"{min(r['seconds'] for r in runs):.2f} to {max(r['seconds'] for r in runs):.2f}",
                    ratio,
                    by_flop,
                    megabytes(runs[0]["weights"]),
                    f"{memory:,.0f}",
                    megabytes(runs[0]["state_bytes"]),
                )
            )
    head = (
        "",
        "s a step, median",
        "of runs",
        "time / full's",
        "FLOP / full's",
        "weights, MB",
        "peak above them, MB",
        "of it 12 bytes a trained value, MB",
    )
    return markdown(head, lines)


# -- 5


def forgetting(rows: Rows) -> str:
    """How the loss on each task's test rows moved, by what was trained."""
    lines = []
    for leg, steps in legs(rows.setting):
        base = rows.get(Job(leg.base))
        for task in rows.setting.tasks:
            for method, name in NAMES.items():
                found = finals_of(rows, task, method, leg)
                if base and found:
                    cells = [
                        spread([f["test"][other] - base["test"][other] for f in found])
                        for other in rows.setting.tasks
                    ]
                    lines.append((f"{TASKS[task].title}, {name}", f"{steps}", *cells))
    return markdown(("trained on", "steps", *(TASKS[task].title for task in rows.setting.tasks)), lines)


def forgetting_verdicts(rows: Rows) -> str:
    """The mean change of the other tasks' loss, of both methods and seed by seed."""
    lines = []
    for leg, steps in legs(rows.setting):
        for task in rows.setting.tasks:
            found = others(rows, task, leg)
            seeds = ", ".join(f"{d:+.3f}" for d in found.differences) or MISSING
            told = verdict(found, words=("lower", "lower"))
            means = (spread(found.lora), spread(found.full))
            lines.append((TASKS[task].title, f"{steps}", *means, seeds, told))
    head = (
        "trained on",
        "steps",
        "others' loss, LoRA",
        "others' loss, full fine-tuning",
        "LoRA minus full, each seed",
        "",
    )
    return markdown(head, lines)


# -- 6


def scarce(rows: Rows) -> str:
    """What runs on few rows came to, the mean of the seeds."""
    lines = []
    for count in rows.setting.scarce:
        passes = rows.setting.scarce_steps * rows.setting.batch_size / count
        for method, name in NAMES.items():
            if found := scarce_runs(rows, method, count):
                steps = sorted({run.step for run in found})
                lines.append(
                    (
                        f"{count:,} rows, {name}",
                        f"{passes:g}",
                        f"{mean(run.learnt for run in found):.3f}",
                        spread([run.held_out for run in found]),
                        spread([run.best for run in found]),
                        ", ".join(f"{step:g}" for step in steps),
                        spread([run.rise for run in found]),
                    )
                )
    head = ("", "passes", "learnt rows, end", "held out, end", "held out, best", "at step", "rise after it")
    return markdown(head, lines)


# -- 7


def matrix(rows: Rows) -> str:
    """Each task's own measure by each adapter on the one base."""
    swap, losses = rows.get(Job("swap")), matrix_losses(rows)
    tasks, lines = rows.setting.tasks, []
    for name, told in [
        *((task, f"adapter of {TASKS[task].title}") for task in tasks),
        ("none", "no adapter"),
    ]:
        cells = [f"{losses[name][task]:.3f}" if name in losses else MISSING for task in tasks]
        cells += [f"{swap['metric'][task][name]:.1f}" if swap else MISSING for task in tasks]
        lines.append((told, *cells))
    titles = [TASKS[task].title for task in tasks]
    measures = [f"{TASKS[task].title}: {METRICS[TASKS[task].metric][0]}" for task in tasks]
    return markdown(("", *(f"{title}: loss" for title in titles), *measures), lines)


# -- 8


def where(rows: Rows) -> str:
    """Place and size of the adapter against the held-out loss."""
    task, lines = rows.setting.main_task, []
    for method in (FULL, LORA, *sorted(variants(rows.setting), key=_order)):
        found = finals_of(rows, task, method)
        trained = f"{found[0]['trained']:,}" if found else MISSING
        losses = spread([one["test"][task] for one in found])
        lines.append((METHODS[method].title, trained, rate_text(best_rate(rows, task, method)), losses))
    return markdown(("", "trained", "learning rate", "held-out loss"), lines)


def _order(method: str) -> tuple[int, int]:
    """Places first, then ranks in order, then the rest."""
    head, _, tail = method.rpartition("-")
    return (1, int(tail)) if head == "rank" else (0 if method.startswith(("attention", "mlp")) else 2, 0)


# -- 9


def quantised(rows: Rows) -> str:
    """The base's loss and LoRA's on rounded weights, and how far each is from the same on 16 bits, seed by seed."""
    task, base, lines = rows.setting.main_task, rows.get(Job("base")), []
    if base:
        plain = [f["test"][task] for f in finals_of(rows, task, LORA)]
        cells = (megabytes(2 * base["parameters"]), f"{base['test'][task]:.3f}", "-", spread(plain), "-")
        lines.append(("as given, 16 bits", *cells))
    for one in rounded_runs(rows) if base else ():
        lines.append(
            (
                METHODS[one.method].title,
                megabytes(one.stored_bytes),
                f"{one.base:.3f}",
                f"{one.base - base['test'][task]:+.3f}",  # pyright: ignore[reportOptionalSubscript]
                spread(one.losses),
                f"{mean(one.apart):+.3f}" if one.apart else MISSING,
            )
        )
    head = (
        *("the base's linear weights", "base as stored, MB", "base's loss", "against 16 bits"),
        *("with LoRA", "against 16 bits, same seeds"),
    )
    return markdown(head, lines)


TABLES: dict[str, Callable[[Rows], str]] = {
    "fixed": fixed,
    "sizes": sizes,
    "costs": costs,
    "forgetting": forgetting,
    "forgetting_verdicts": forgetting_verdicts,
    "scarce": scarce,
    "matrix": matrix,
    "where": where,
    "quantised": quantised,
}
