"""The claims' short answers, each a function of the rows; "" where the rows do not give it yet."""

from __future__ import annotations

from statistics import mean, median

from benchmarks.evidence.lookup import (
    Pair,
    main_losses,
    others,
    pair,
    rounded_runs,
    scarce_runs,
    step_runs,
)
from benchmarks.evidence.plan import (
    BOTH,
    FULL,
    LABELLED,
    LORA,
    METHODS,
    PAIRED,
    SHORT,
    Job,
    legs,
    variants,
)
from benchmarks.evidence.rows import Rows
from benchmarks.evidence.tasks import TASKS
from benchmarks.evidence.text import MISSING, apart


def answers(rows: Rows) -> dict[str, str]:
    """By claim; what is missing is said to be."""
    return {name: told or f"*{MISSING}*" for name, told in ((n, find(rows)) for n, find in ANSWERS.items())}


def _fixed(rows: Rows) -> str:
    found = [row["found"] for row in rows.valid() if "off_equal" in row["found"]]
    bad = sum(f["changed"] > 0 or not f["off_equal"] or not f["ejected_equal"] for f in found)
    return f"yes, in {len(found) - bad} of {len(found)} runs" if found else ""


def _small(rows: Rows) -> str:
    found = {method: rows.get(Job("sizes", method=method)) for method in (LORA, FULL)}
    lora, full = found[LORA], found[FULL]
    if not lora or not full:
        return ""
    share, state = lora["trained"] / lora["total"], lora["optimizer"] / full["optimizer"]
    return f"{share:.1%} of the values and {state:.1%} of the optimiser's state at rank 16"


def _cheap(rows: Rows) -> str:
    told = []
    for dtype in ("bfloat16", "float32"):
        full, lora = (step_runs(rows, side, dtype) for side in ("full", "engine"))
        if full and lora:
            second, memory = (
                median(r[part] for r in lora) / median(r[part] for r in full)
                for part in ("seconds", "memory")
            )
            told.append(f"{dtype} {second:.2f} of the time, {memory:.2f} of the memory above the weights")
    return f"of full fine-tuning's: {'; '.join(told)}" if told else ""


def _good(rows: Rows) -> str:
    told = []
    for leg, steps in legs(rows.setting):
        found = [
            (TASKS[t].title, pair(rows, t, lambda f, t=t: f["test"][t], leg)) for t in rows.setting.tasks
        ]
        if texts := [f"{title} {apart(one)}{_wins(one)}" for title, one in found if one.lora]:
            told.append(f"{', '.join(texts)} nats after {steps} steps")
    for title, task, leg, field in (
        ("classes", rows.setting.label_task, LABELLED, "accuracy"),
        ("vectors", rows.setting.pair_task, PAIRED, "accuracy_at_1"),
    ):
        found = pair(rows, task, lambda f, field=field: 100 * f["test"][field], leg)
        if found.lora:
            told.append(f"{title} {apart(found, 1)}{_wins(found, less_is_better=False)} points right")
    head = "LoRA minus full fine-tuning (in brackets the seeds in which LoRA is better): "
    return head + "; ".join(told) if told else ""


def _wins(found: Pair, less_is_better: bool = True) -> str:
    wins = sum(d < 0 if less_is_better else d > 0 for d in found.differences)
    return f" ({wins} of {len(found.differences)})"


def _kept(rows: Rows) -> str:
    told = []
    for leg, steps in legs(rows.setting):
        found = [(TASKS[task].title, others(rows, task, leg)) for task in rows.setting.tasks]
        if texts := [
            f"of {title} LoRA {mean(one.lora):+.3f}, full {mean(one.full):+.3f}{_wins(one)}"
            for title, one in found
            if one.lora
        ]:
            told.append(f"after {steps} steps {'; '.join(texts)}")
    head = "change of the loss on the other tasks, nats (in brackets the seeds in which LoRA's is lower), "
    return head + ". ".join(told) if told else ""


def _scarce(rows: Rows) -> str:
    """The held-out loss of both methods where it is best and where training ends."""
    told = []
    for count in rows.setting.scarce:
        lora, full = (scarce_runs(rows, method, count) for method in BOTH)
        if lora and len(lora) == len(full):
            best = Pair([run.best for run in lora], [run.best for run in full])
            end = Pair([run.held_out for run in lora], [run.held_out for run in full])
            told.append(f"{count:,} rows {apart(best)}{_wins(best)} and {apart(end)}{_wins(end)}")
    head = "held-out loss at its best and at the end, LoRA minus full fine-tuning, nats"
    return f"{head} (in brackets the seeds in which LoRA's is lower): {'; '.join(told)}" if told else ""


def _many(rows: Rows) -> str:
    found = rows.get(Job("swap"))
    if not found:
        return ""
    best = [
        task
        for task, by in found["metric"].items()
        if by[task] >= max(value for name, value in by.items() if name != task)
    ]
    size, off = found["adapter_bytes"] / 1e6, found["mixed_off"]
    return (
        f"own adapter best (or level) on {len(best)} of {len(found['metric'])} tasks; {size:.1f} MB an adapter; "
        f"rows of a mixed batch differ from rows alone by at most {off:.1e} of the largest logit"
    )


def _where(rows: Rows) -> str:
    """Places at as many values, and ranks, beside how far LoRA's own seeds are apart."""
    known = main_losses(rows, (LORA, *variants(rows.setting)))
    if not known:
        return ""
    means = {method: mean(losses) for method, losses in known.items()}
    told = [
        f"{METHODS[method].title} {means[method] - means[LORA]:+.3f} nats against all linear"
        for method in ("mlp-even", "attention-even")
    ]
    ranks = [means[name] for name in (*(f"rank-{rank}" for rank in rows.setting.learned_ranks), LORA)]
    told.append(f"{len(ranks)} ranks within {max(ranks) - min(ranks):.3f}")
    seeds = known[LORA]
    if len(seeds) > 1:
        told.append(f"LoRA's own seeds within {max(seeds) - min(seeds):.3f}")
    return f"{'; '.join(told)} ({rows.setting.steps} steps)"


def _quantised(rows: Rows) -> str:
    base, task = rows.get(Job(SHORT.base)), rows.setting.main_task
    told = [
        f"{METHODS[one.method].title}: the base {one.base - base['test'][task]:+.3f}, with LoRA {mean(one.apart):+.3f}"
        for one in rounded_runs(rows)
        if base and one.apart
    ]
    return f"loss against 16 bits, nats: {'; '.join(told)}" if told else ""


ANSWERS = {
    "fixed": _fixed,
    "small": _small,
    "cheap": _cheap,
    "good": _good,
    "kept": _kept,
    "scarce": _scarce,
    "many": _many,
    "where": _where,
    "quantised": _quantised,
}
