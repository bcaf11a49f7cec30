"""docs/evidence.md and its pictures, from the rows alone: the text holds no number that the template gave it."""

from __future__ import annotations

import os
from pathlib import Path
from statistics import mean
from typing import Any

import jinja2

from benchmarks.evidence.lookup import Pair, finals_of, label_finals, other_loss, pair, step_runs
from benchmarks.evidence.papers import papers
from benchmarks.evidence.pictures import PICTURES as DRAWN
from benchmarks.evidence.pictures import svg
from benchmarks.evidence.plan import BOTH, FULL, LORA, METHODS, Job, best_rate, tried, variants
from benchmarks.evidence.quality import QUALITY
from benchmarks.evidence.rows import Rows
from benchmarks.evidence.settings import KNOWN
from benchmarks.evidence.tables import TABLES
from benchmarks.evidence.tasks import METRICS, TASKS
from benchmarks.evidence.text import MISSING, rate_text, verdict
from onebase.config import OptimConfig
from onebase.files import write_text

ROOT = Path(__file__).parents[2]
PAGE, PICTURES = ROOT / "docs" / "evidence.md", ROOT / "docs" / "img"
TEMPLATE = Path(__file__).with_name("page.md.j2")


def page(rows: Rows, pictures: str = "img") -> str:
    """The page's text; `pictures` is their folder as seen from it."""
    made = jinja2.Environment(
        undefined=jinja2.StrictUndefined, trim_blocks=True, lstrip_blocks=True, autoescape=False
    )
    template = made.from_string(TEMPLATE.read_text(encoding="utf-8"))
    tables = {name: table(rows) for name, table in {**TABLES, **QUALITY}.items()} | {"papers": papers(rows)}
    return template.render(table=tables, img=pictures, **facts(rows)).rstrip() + "\n"


def render(rows: Rows, target: Path, pictures: Path) -> None:
    """Write the page and its pictures."""
    pictures.mkdir(parents=True, exist_ok=True)
    for name in DRAWN:
        write_text(pictures / f"evidence-{name}.svg", svg(rows, name))
    target.parent.mkdir(parents=True, exist_ok=True)
    folder = Path(os.path.relpath(pictures, target.parent)).as_posix()
    write_text(target, page(rows, folder))


def facts(rows: Rows) -> dict[str, Any]:
    """The single numbers and verdicts that the text needs."""
    setting = rows.setting
    valid = rows.valid()
    machines = sorted({_machine(row["machine"]) for row in valid})
    dates = sorted(row["date"][:10] for row in valid)
    base = rows.get(Job("base"))
    return {
        "setting": setting,
        "rows": len(valid),
        "machines": machines,
        "dates": " to ".join(sorted({dates[0], dates[-1]})) if dates else MISSING,
        "base": base,
        "tasks": [_task(rows, name) for name in setting.tasks],
        "main": TASKS[setting.main_task].title,
        "answer": answers(rows),
        "first_off": max(
            (row["found"]["first_off"] for row in valid if "first_off" in row["found"]), default=None
        ),
        "swap": rows.get(Job("swap")),
        "known": KNOWN,
        "default_rate": rate_text(OptimConfig().lr),
        "classes": rows.get(Job("label-base", setting.label_task)),
    }


def _machine(made: dict[str, Any]) -> str:
    versions = ", ".join(f"{name} {made[name]}" for name in ("torch", "transformers", "onebase"))
    return f"{made['cpu']}, {made['cores']} cores, {made['memory_gb']:.0f} GB; Python {made['python']}, {versions}"


def _task(rows: Rows, name: str) -> dict[str, Any]:
    found = finals_of(rows, name, LORA)
    base = rows.get(Job("base"))
    return {
        "title": TASKS[name].title,
        "metric": METRICS[TASKS[name].metric][0],
        "tokens": round(mean(f["tokens"] for f in found)) if found else None,
        "pool": base["rows"][name][0] if base else None,
        "test": base["rows"][name][2] if base else None,
        "verdict": verdict(pair(rows, name, lambda f: f["test"][name])),
        "metric_verdict": verdict(pair(rows, name, lambda f: f["metric"]), less_is_better=False),
    }


def answers(rows: Rows) -> dict[str, str]:
    """The claims' short answers, where the rows give one."""
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
                sorted(r[part] for r in lora)[len(lora) // 2] / sorted(r[part] for r in full)[len(full) // 2]
                for part in ("seconds", "memory")
            )
            told.append(f"{dtype}: {second:.2f} of the time and {memory:.2f} of the memory above the base")
    return "; ".join(told)


def _good(rows: Rows) -> str:
    told = []
    for name in rows.setting.tasks:
        found = pair(rows, name, lambda f, n=name: f["test"][n])
        if found.lora:
            told.append(f"{TASKS[name].title}: {verdict(found)} ({mean(found.differences):+.3f} nats)")
    if (classes := _classes(rows)).lora:
        apart = 100 * mean(classes.differences)
        told.append(f"classes: {verdict(classes, less_is_better=False)} ({apart:+.1f} points of accuracy)")
    return "; ".join(told)


def _classes(rows: Rows) -> Pair:
    """The accuracies of both methods, where all seeds of both are there."""
    found = [[f["test"]["accuracy"] for f in label_finals(rows, method)] for method in BOTH]
    return Pair(*found) if all(len(one) == len(rows.setting.seeds) for one in found) else Pair([], [])


def _kept(rows: Rows) -> str:
    base, tasks, told = rows.get(Job("base")), rows.setting.tasks, []
    for name in tasks if base else ():
        found = pair(rows, name, lambda f, n=name: other_loss(f, base, n, tasks))  # pyright: ignore[reportArgumentType]
        if found.lora:
            told.append(
                f"after {TASKS[name].title} LoRA {mean(found.lora):+.3f}, full {mean(found.full):+.3f} nats"
            )
    return "; ".join(told)


def _scarce(rows: Rows) -> str:
    task, told = rows.setting.main_task, []
    for count in rows.setting.scarce:
        ends = []
        for method in BOTH:
            rate = best_rate(rows, task, method)
            found = rows.get(Job("scarce", task, method, rate or 0.0, 0, count))
            ends.append(found["curve"][-1]["test"] if found else None)
        if None not in ends:
            told.append(f"{count} rows: {ends[0] - ends[1]:+.3f}")
    return (
        f"LoRA's held-out loss minus full fine-tuning's at the end, nats: {', '.join(told)}" if told else ""
    )


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
    task, found = rows.setting.main_task, []
    for method in (LORA, *variants(rows.setting)):
        losses = tried(rows, task, method)
        if losses:
            found.append((min(losses.values()), METHODS[method].title))
    found.sort()
    if len(found) < 2:
        return ""
    return f"least tuning loss: {found[0][1]} ({found[0][0]:.3f}); most: {found[-1][1]} ({found[-1][0]:.3f})"


def _quantised(rows: Rows) -> str:
    task, rate = rows.setting.main_task, best_rate(rows, rows.setting.main_task, LORA)
    plain = [f["test"][task] for f in finals_of(rows, task, LORA)]
    told = []
    for method in ("int8", "int4-64", "int4-row"):
        found = [rows.get(Job("final", task, method, rate or 0.0, seed)) for seed in rows.setting.seeds]
        losses = [f["test"][task] for f in found if f]
        if losses and plain:
            told.append(f"{METHODS[method].title}: {mean(losses) - mean(plain):+.3f} nats")
    return f"LoRA's loss against that on 16 bits: {'; '.join(told)}" if told else ""


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
