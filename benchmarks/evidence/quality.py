"""The tables of section 4: how good both methods are, and at which learning rates."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from statistics import mean

from benchmarks.evidence.lookup import finals_of, pair
from benchmarks.evidence.plan import (
    ALL_RATES,
    BOTH,
    LABELLED,
    LORA,
    METHODS,
    PAIRED,
    SHORT,
    USUAL_RATES,
    USUAL_TASKS,
    Job,
    best_rate,
    legs,
    tried,
)
from benchmarks.evidence.rows import Rows
from benchmarks.evidence.settings import TUNING_SEED
from benchmarks.evidence.tasks import METRICS, TASKS
from benchmarks.evidence.text import MISSING, NAMES, apart, markdown, rate_text, spread, verdict


def quality(rows: Rows) -> str:
    """The base and both methods, after short runs and after longer ones, each with held-out rows of its own."""
    lines = []
    for leg, steps in legs(rows.setting):
        base = rows.get(Job(leg.base))
        for task in rows.setting.tasks:
            title = TASKS[task].title
            if base:
                loss, metric = base["test"][task], base["metric"][task]
                lines.append(
                    (f"{title}: base", "-", "-", f"{loss:.3f}", f"{math.exp(loss):.2f}", f"{metric:.1f}")
                )
            for method, name in NAMES.items():
                found = finals_of(rows, task, method, leg)
                losses = [f["test"][task] for f in found]
                rate = rate_text(best_rate(rows, task, method, leg))
                perplexity = f"{mean(map(math.exp, losses)):.2f}" if losses else MISSING
                answers = spread([f["metric"] for f in found], 1)
                lines.append((f"{title}: {name}", f"{steps}", rate, spread(losses), perplexity, answers))
    measures = ", ".join(
        f"{TASKS[task].title} {METRICS[TASKS[task].metric][0]}" for task in rows.setting.tasks
    )
    head = ("", "steps", "learning rate", "held-out loss", "perplexity", f"answers ({measures})")
    return markdown(head, lines)


def differences(rows: Rows) -> str:
    """LoRA minus full fine-tuning, seed by seed."""
    lines = []
    for leg, steps in legs(rows.setting):
        for task in rows.setting.tasks:
            for name, figure, less in (
                ("loss", lambda f, t=task: f["test"][t], True),
                (METRICS[TASKS[task].metric][0], lambda f: f["metric"], False),
            ):
                found = pair(rows, task, figure, leg)
                digits = 3 if less else 1
                seeds = ", ".join(f"{d:+.{digits}f}" for d in found.differences) or MISSING
                told = (seeds, apart(found, digits), verdict(found, less))
                lines.append((f"{TASKS[task].title}, {name}", f"{steps}", *told))
    return markdown(("", "steps", "LoRA minus full, each seed", "mean", ""), lines)


def rates(rows: Rows) -> str:
    """The losses on the tuning rows by which the rates were chosen."""
    lines = []
    for leg, steps in legs(rows.setting):
        for task in rows.setting.tasks:
            for method in BOTH:
                if found := tried(rows, task, method, leg):
                    best = best_rate(rows, task, method, leg)
                    edge = " (edge)" * (best in (min(found), max(found)))
                    cells = [
                        _tuned(found.get(rate), rate == best) + edge * (rate == best) for rate in ALL_RATES
                    ]
                    lines.append((f"{TASKS[task].title}: {NAMES[method]}", f"{steps}", *cells))
    used = [n for n in range(len(ALL_RATES)) if any(line[n + 2] for line in lines)]
    short = [(*line[:2], *(line[n + 2] for n in used)) for line in lines]
    return markdown(("", "steps", *(rate_text(ALL_RATES[n]) for n in used)), short)


def default_rate(rows: Rows) -> str:
    """LoRA at the former default rate, the present one and a higher one: loss on the tuning rows."""
    setting, lines = rows.setting, []
    runs = [(leg.tune, f"{steps} steps of {setting.batch_size}") for leg, steps in legs(setting)]
    usual = ("usual", f"{setting.usual_epochs} epochs, batches of {setting.usual_batch}")
    for number, task in enumerate(setting.tasks):
        for kind, told in [*runs, usual] if number < USUAL_TASKS else runs:
            found = [rows.get(Job(kind, task, LORA, rate, TUNING_SEED)) for rate in USUAL_RATES]
            losses = [math.inf if row and row["tune"] is None else row and row["tune"] for row in found]
            least = min((loss for loss in losses if loss is not None), default=None)
            cells = [MISSING if loss is None else _tuned(loss, loss == least) for loss in losses]
            lines.append((f"{TASKS[task].title}, {told}", *cells))
    return markdown(("", *(f"at {rate_text(rate)}" for rate in USUAL_RATES)), lines)


def labels(rows: Rows) -> str:
    """Classes by an encoder: the constant answer and both methods."""
    task = rows.setting.label_task
    lines = []
    if base := rows.get(Job(LABELLED.base, task)):
        test = base["test"]
        lines.append(("the commonest class", "-", f"{test['loss']:.3f}", *_percent([test])))
    for method, name in NAMES.items():
        found = [f["test"] for f in finals_of(rows, task, method, LABELLED)]
        rate = rate_text(best_rate(rows, task, method, LABELLED))
        lines.append((name, rate, spread([f["loss"] for f in found]), *_percent(found)))
    return markdown(("", "learning rate", "held-out loss", "accuracy, %", "macro F1, %"), lines)


def vectors(rows: Rows) -> str:
    """Texts that say the same, found by an encoder's vectors: the base and both methods."""
    task, lines = rows.setting.pair_task, []
    if base := rows.get(Job(PAIRED.base, task)):
        lines.append(("base", "-", f"{base['test']['loss']:.3f}", *_found([base["test"]])))
    for method, name in NAMES.items():
        found = [f["test"] for f in finals_of(rows, task, method, PAIRED)]
        rate = rate_text(best_rate(rows, task, method, PAIRED))
        lines.append((name, rate, spread([f["loss"] for f in found]), *_found(found)))
    return markdown(("", "learning rate", "held-out loss", "accuracy@1, %", "MRR@10"), lines)


def _found(found: Sequence[Mapping[str, float]]) -> tuple[str, str]:
    first, ranks = [100 * one["accuracy_at_1"] for one in found], [one["mrr_at_10"] for one in found]
    return (f"{first[0]:.1f}", f"{ranks[0]:.3f}") if len(found) == 1 else (spread(first, 1), spread(ranks))


def _percent(found: Sequence[Mapping[str, float]]) -> tuple[str, str]:
    told = [[100 * one[name] for one in found] for name in ("accuracy", "macro_f1")]
    return tuple(f"{part[0]:.1f}" if len(part) == 1 else spread(part, 1) for part in told)  # pyright: ignore[reportReturnType]


def _tuned(loss: float | None, best: bool) -> str:
    if loss is None:
        return ""
    told = f"{loss:.3f}" if math.isfinite(loss) else "diverged"
    return f"**{told}**" if best else told


def precision(rows: Rows) -> str:
    """Held-out loss of the first seed in the setting's dtype and in float32."""
    task, seed, lines = rows.setting.main_task, rows.setting.seeds[0], []
    for method in BOTH:
        rate = best_rate(rows, task, method) or 0.0
        found = [rows.get(Job(SHORT.final, task, name, rate, seed)) for name in (method, f"{method}-fp32")]
        cells = [f"{f['test'][task]:.4f}" if f else MISSING for f in found]
        off = [f"{f['first_off']:.1e}" if f else MISSING for f in found]
        lines.append((METHODS[method].title, *cells, *off))
    head = ("", rows.setting.dtype, "float32", f"first loss off the base's, {rows.setting.dtype}", "float32")
    return markdown(head, lines)


QUALITY: dict[str, Callable[[Rows], str]] = {
    "quality": quality,
    "differences": differences,
    "rates": rates,
    "default_rate": default_rate,
    "labels": labels,
    "vectors": vectors,
    "precision": precision,
}
