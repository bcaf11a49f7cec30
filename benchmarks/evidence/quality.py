"""The tables of section 4: how good both methods are, and at which learning rates."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from statistics import mean

from benchmarks.evidence.lookup import finals_of, label_finals, pair, pair_finals
from benchmarks.evidence.plan import (
    ALL_RATES,
    BOTH,
    FORMER_DEFAULT,
    FULL,
    LORA,
    METHODS,
    Job,
    best_rate,
    tried,
)
from benchmarks.evidence.rows import Rows
from benchmarks.evidence.settings import TUNING_SEED
from benchmarks.evidence.tasks import METRICS, TASKS
from benchmarks.evidence.text import MISSING, apart, markdown, rate_text, spread, verdict
from onebase.config import OptimConfig


def quality(rows: Rows) -> str:
    base = rows.get(Job("base")) or {}
    lines = []
    for task in rows.setting.tasks:
        title = TASKS[task].title
        if base:
            loss = base["test"][task]
            lines.append(
                (
                    f"{title}: base",
                    "-",
                    f"{loss:.3f}",
                    f"{math.exp(loss):.2f}",
                    f"{base['metric'][task]:.1f}",
                )
            )
        for method in (FULL, LORA):
            found = finals_of(rows, task, method)
            losses = [f["test"][task] for f in found]
            lines.append(
                (
                    f"{title}: {'LoRA' if method == LORA else 'full fine-tuning'}",
                    rate_text(best_rate(rows, task, method)),
                    spread(losses),
                    f"{mean(map(math.exp, losses)):.2f}" if losses else MISSING,
                    spread([f["metric"] for f in found], 1),
                )
            )
    measures = ", ".join(
        f"{TASKS[task].title} {METRICS[TASKS[task].metric][0]}" for task in rows.setting.tasks
    )
    return markdown(("", "learning rate", "held-out loss", "perplexity", f"answers ({measures})"), lines)


def differences(rows: Rows) -> str:
    """LoRA minus full fine-tuning, seed by seed."""
    lines = []
    for task in rows.setting.tasks:
        for name, figure, less in (
            ("loss", lambda f, t=task: f["test"][t], True),
            (METRICS[TASKS[task].metric][0], lambda f: f["metric"], False),
        ):
            found = pair(rows, task, figure)
            digits = 3 if less else 1
            seeds = ", ".join(f"{d:+.{digits}f}" for d in found.differences) or MISSING
            lines.append((f"{TASKS[task].title}, {name}", seeds, apart(found, digits), verdict(found, less)))
    return markdown(("", "LoRA minus full, each seed", "mean", ""), lines)


def rates(rows: Rows) -> str:
    """The losses on the tuning rows by which the rates were chosen."""
    lines = []
    for task in rows.setting.tasks:
        for method in BOTH:
            found = tried(rows, task, method)
            if found:
                best = best_rate(rows, task, method)
                edge = " (edge)" * (best in (min(found), max(found)))
                cells = [_tuned(found.get(rate), rate == best) + edge * (rate == best) for rate in ALL_RATES]
                lines.append((f"{TASKS[task].title}: {METHODS[method].title}", *cells))
    used = [n for n in range(len(ALL_RATES)) if any(line[n + 1] for line in lines)]
    short = [(line[0], *(line[n + 1] for n in used)) for line in lines]
    return markdown(("", *(rate_text(ALL_RATES[n]) for n in used)), short)


def longer(rows: Rows) -> str:
    """The losses on the tuning rows of short and of longer runs, and the test loss at the best rate."""
    task, setting, lines = rows.setting.main_task, rows.setting, []
    for method in BOTH:
        for kind, steps in (("tune", setting.steps), ("long", setting.long_steps)):
            if found := tried(rows, task, method, kind):
                best = min(found, key=found.__getitem__)
                row = rows.get(Job(kind, task, method, best, TUNING_SEED)) or {}
                test = f"{row['test']:.3f}" if row.get("test") is not None else MISSING
                cells = [_tuned(found.get(rate), rate == best) for rate in ALL_RATES]
                lines.append((f"{METHODS[method].title}, {steps} steps", *cells, test))
    used = [n for n in range(len(ALL_RATES)) if any(line[n + 1] for line in lines)]
    short = [(line[0], *(line[n + 1] for n in used), line[-1]) for line in lines]
    return markdown(("", *(rate_text(ALL_RATES[n]) for n in used), "held out, best rate"), short)


def default_rate(rows: Rows) -> str:
    """What `onebase train`'s rate and its former one give, beside the best rate that was tried."""
    task, rates, lines = rows.setting.main_task, (FORMER_DEFAULT, OptimConfig().lr), []
    for kind, steps in (("tune", rows.setting.steps), ("long", rows.setting.long_steps)):
        found = tried(rows, task, LORA, kind)
        best = min(found, key=found.__getitem__, default=None)
        ran = [rows.get(Job(kind, task, LORA, rate, TUNING_SEED)) for rate in rates]
        losses = [row and (math.inf if row["tune"] is None else row["tune"]) for row in ran]
        cells = [MISSING if loss is None else _tuned(loss, False) for loss in losses]
        told = f"{found[best]:.3f} at {rate_text(best)}" if best else MISSING
        lines.append((f"{steps} steps", *cells, told))
    return markdown(("", *(f"at {rate_text(rate)}" for rate in rates), "best rate tried"), lines)


def labels(rows: Rows) -> str:
    """Classes by an encoder: the constant answer and both methods."""
    task = rows.setting.label_task
    lines = []
    if base := rows.get(Job("label-base", task)):
        test = base["test"]
        lines.append(("the commonest class", "-", f"{test['loss']:.3f}", *_percent([test])))
    for method in (FULL, LORA):
        found = label_finals(rows, method)
        rate = rate_text(best_rate(rows, task, method, "label-tune"))
        name = "LoRA" if method == LORA else "full fine-tuning"
        lines.append(
            (name, rate, spread([f["test"]["loss"] for f in found]), *_percent([f["test"] for f in found]))
        )
    return markdown(("", "learning rate", "held-out loss", "accuracy, %", "macro F1, %"), lines)


def vectors(rows: Rows) -> str:
    """Texts that say the same, found by an encoder's vectors: the base and both methods."""
    task, lines = rows.setting.pair_task, []
    if base := rows.get(Job("pair-base", task)):
        lines.append(("base", "-", f"{base['test']['loss']:.3f}", *_found([base["test"]])))
    for method in (FULL, LORA):
        found = [f["test"] for f in pair_finals(rows, method)]
        rate = rate_text(best_rate(rows, task, method, "pair-tune"))
        name = "LoRA" if method == LORA else "full fine-tuning"
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
        found = [rows.get(Job("final", task, name, rate, seed)) for name in (method, f"{method}-fp32")]
        cells = [f"{f['test'][task]:.4f}" if f else MISSING for f in found]
        off = [f"{f['first_off']:.1e}" if f else MISSING for f in found]
        lines.append((METHODS[method].title, *cells, *off))
    head = ("", rows.setting.dtype, "float32", f"first loss off the base's, {rows.setting.dtype}", "float32")
    return markdown(head, lines)


QUALITY: dict[str, Callable[[Rows], str]] = {
    "quality": quality,
    "differences": differences,
    "rates": rates,
    "longer": longer,
    "default_rate": default_rate,
    "labels": labels,
    "vectors": vectors,
    "precision": precision,
}
