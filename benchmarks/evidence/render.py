"""docs/evidence.md and its pictures, from the rows alone: the text holds no number that the template gave it."""

from __future__ import annotations

import os
from pathlib import Path
from statistics import mean
from typing import Any

import jinja2

from benchmarks.evidence.answers import answers
from benchmarks.evidence.lookup import finals_of
from benchmarks.evidence.papers import papers
from benchmarks.evidence.pictures import PICTURES as DRAWN
from benchmarks.evidence.pictures import svg
from benchmarks.evidence.plan import BOTH, DEFAULT, FORMER_DEFAULT, LABELLED, LORA, PAIRED, SHORT, Job, legs
from benchmarks.evidence.quality import QUALITY
from benchmarks.evidence.rows import Rows
from benchmarks.evidence.settings import KNOWN
from benchmarks.evidence.tables import TABLES
from benchmarks.evidence.tasks import METRICS, TASKS
from benchmarks.evidence.text import MISSING, rate_text
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
    base = rows.get(Job(SHORT.base))
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
        "default_rate": rate_text(DEFAULT),
        "former_rate": rate_text(FORMER_DEFAULT),
        "classes": rows.get(Job(LABELLED.base, setting.label_task)),
        "vectors": rows.get(Job(PAIRED.base, setting.pair_task)),
        "unmoved": [TASKS[name].title for name in setting.tasks if _unmoved(rows, name)],
        "chance": 2 ** (len(setting.seeds) - 1),
    }


def _machine(made: dict[str, Any]) -> str:
    versions = ", ".join(f"{name} {made[name]}" for name in ("torch", "transformers", "onebase"))
    return f"{made['cpu']}, {made['cores']} cores, {made['memory_gb']:.0f} GB; Python {made['python']}, {versions}"


def _task(rows: Rows, name: str) -> dict[str, Any]:
    """A task's sizes: rows to learn from; tokens of a run, held-out rows and answers by length of run."""
    told: dict[str, list[str]] = {"tokens": [], "test": [], "answers": []}
    pool = MISSING
    for leg, _ in legs(rows.setting):
        found, base = finals_of(rows, name, LORA, leg), rows.get(Job(leg.base))
        told["tokens"].append(f"{mean(f['tokens'] for f in found):,.0f}" if found else MISSING)
        counts = base["rows"][name] if base else [MISSING] * 4
        pool = counts[0] if base else pool
        told["test"].append(f"{counts[2]}")
        told["answers"].append(f"{counts[3]}")
    return {
        "title": TASKS[name].title,
        "metric": METRICS[TASKS[name].metric][0],
        "pool": pool,
        **{part: " / ".join(texts) for part, texts in told.items()},
    }


def _unmoved(rows: Rows, name: str) -> bool:
    """Whether the task's answers are all wrong, by the base and after every training."""
    found = [
        f["metric"]
        for leg, _ in legs(rows.setting)
        for method in BOTH
        for f in finals_of(rows, name, method, leg)
    ]
    return bool(found) and not any(found)
