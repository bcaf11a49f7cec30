"""docs/evidence.md and its pictures, from the rows alone: the text holds no number that the template gave it."""

from __future__ import annotations

import os
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from statistics import mean, median
from typing import Any

import jinja2

from benchmarks.evidence.lookup import (
    Pair,
    finals_of,
    label_finals,
    other_loss,
    pair,
    pair_finals,
    rounded_runs,
    scarce_curve,
    step_runs,
)
from benchmarks.evidence.papers import on_test, papers
from benchmarks.evidence.pictures import PICTURES as DRAWN
from benchmarks.evidence.pictures import svg
from benchmarks.evidence.plan import BOTH, FORMER_DEFAULT, FULL, LORA, METHODS, Job, variants
from benchmarks.evidence.quality import QUALITY
from benchmarks.evidence.rows import Rows
from benchmarks.evidence.settings import KNOWN
from benchmarks.evidence.tables import TABLES
from benchmarks.evidence.tasks import METRICS, TASKS
from benchmarks.evidence.text import MISSING, apart, rate_text, verdict
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
        "former_rate": rate_text(FORMER_DEFAULT),
        "classes": rows.get(Job("label-base", setting.label_task)),
        "vectors": rows.get(Job("pair-base", setting.pair_task)),
        "unmoved": [TASKS[name].title for name in setting.tasks if _unmoved(rows, name)],
        "chance": 2 ** (len(setting.seeds) - 1),
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
    }


def _unmoved(rows: Rows, name: str) -> bool:
    """Whether the task's answers are all wrong, by the base and after every training."""
    found = [f["metric"] for method in BOTH for f in finals_of(rows, name, method)]
    base = rows.get(Job("base"))
    return bool(base and found) and not any([*found, base["metric"][name]])  # pyright: ignore[reportOptionalSubscript]


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
                median(r[part] for r in lora) / median(r[part] for r in full)
                for part in ("seconds", "memory")
            )
            told.append(f"{dtype} {second:.2f} of the time, {memory:.2f} of the memory above the weights")
    return f"of full fine-tuning's: {'; '.join(told)}" if told else ""


def _good(rows: Rows) -> str:
    told = []
    for name in rows.setting.tasks:
        found = pair(rows, name, lambda f, n=name: f["test"][n])
        if found.lora:
            told.append(f"{TASKS[name].title}: {verdict(found)} ({apart(found)} nats)")
    for title, finals, field in (
        ("classes", label_finals, "accuracy"),
        ("vectors", pair_finals, "accuracy_at_1"),
    ):
        found = _points(rows, finals, field)
        if found.lora:
            told.append(f"{title}: {verdict(found, less_is_better=False)} ({apart(found, 1)} points)")
    return f"LoRA minus full fine-tuning: {'; '.join(told)}" if told else ""


def _points(rows: Rows, finals: Callable[[Rows, str], Sequence[Mapping[str, Any]]], field: str) -> Pair:
    """A figure in percent of both methods, where all seeds of both are there."""
    found = [[100 * f["test"][field] for f in finals(rows, method)] for method in BOTH]
    return Pair(*found) if all(len(one) == len(rows.setting.seeds) for one in found) else Pair([], [])


def _kept(rows: Rows) -> str:
    base, tasks, told = rows.get(Job("base")), rows.setting.tasks, []
    for name in tasks if base else ():
        found = pair(rows, name, lambda f, n=name: other_loss(f, base, n, tasks))  # pyright: ignore[reportArgumentType]
        if found.lora:
            told.append(f"{TASKS[name].title} LoRA {mean(found.lora):+.3f}, full {mean(found.full):+.3f}")
    return f"change of the loss on the other tasks, nats, after {'; '.join(told)}" if told else ""


def _scarce(rows: Rows) -> str:
    """How far the held-out loss rose from its best to the end of training."""
    told = []
    for count in rows.setting.scarce:
        curves = [scarce_curve(rows, method, count) for method in BOTH]
        if all(curves):
            lora, full = (one[-1]["test"] - min(point["test"] for point in one) for one in curves)
            told.append(f"{count:,} rows LoRA {lora:+.3f}, full {full:+.3f}")
    return f"rise of the held-out loss after its best, nats: {'; '.join(told)}" if told else ""


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
    """Places at as many values, and ranks, beside how far LoRA's own seeds are apart; settled rates alone."""
    task, setting, told = rows.setting.main_task, rows.setting, []
    found = {method: on_test(rows, method, settled=True) for method in (LORA, *variants(setting))}
    known = {method: mean(losses) for method, (losses, _) in found.items() if losses}
    if LORA in known:
        for method in ("mlp-even", "attention-even"):
            if method in known:
                told.append(
                    f"{METHODS[method].title} {known[method] - known[LORA]:+.3f} nats against all linear"
                )
    ranks = [known[name] for name in (*(f"rank-{r}" for r in setting.learned_ranks), LORA) if name in known]
    if len(ranks) > 1:
        told.append(f"{len(ranks)} ranks within {max(ranks) - min(ranks):.3f}")
    seeds = [f["test"][task] for f in finals_of(rows, task, LORA)]
    if told and len(seeds) > 1:
        told.append(f"LoRA's own seeds within {max(seeds) - min(seeds):.3f}")
    return "; ".join(told)


def _quantised(rows: Rows) -> str:
    base, task = rows.get(Job("base")), rows.setting.main_task
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
