"""What papers report, and what the rows say to the same question. The papers' numbers are theirs."""

from __future__ import annotations

from collections.abc import Callable
from statistics import mean, stdev
from typing import NamedTuple

from benchmarks.evidence.lookup import main_losses, others, pair, step_runs
from benchmarks.evidence.plan import BOTH, FULL, LORA, METHODS, Job, Leg, best_rate, legs
from benchmarks.evidence.rows import Rows
from benchmarks.evidence.tasks import TASKS
from benchmarks.evidence.text import MISSING, apart, markdown, rate_text, verdict

KEPT = ("lower on the others", "lower on the others")


class Statement(NamedTuple):
    """A paper's finding, where it was looked up, and the function that gives ours: "" where rows are missing."""

    paper: str
    reports: str
    read_in: str
    here: Callable[[Rows], str]


def by_task(rows: Rows, told: Callable[[str, Leg], str]) -> str:
    """One answer for each task that has one, after short runs and after longer ones."""
    parts = []
    for leg, steps in legs(rows.setting):
        found = [(TASKS[task].title, told(task, leg)) for task in rows.setting.tasks]
        if texts := [f"{title}: {text}" for title, text in found if text]:
            parts.append(f"{steps} steps: {'; '.join(texts)}")
    return ". ".join(parts)


def as_good(rows: Rows) -> str:
    def told(task: str, leg: Leg) -> str:
        found = pair(rows, task, lambda f: f["test"][task], leg)
        return f"{verdict(found)} ({apart(found)} nats)" if found.lora else ""

    return by_task(rows, told)


def bleu(rows: Rows) -> str:
    def told(task: str, leg: Leg) -> str:
        found = pair(rows, task, lambda f: f["metric"], leg)
        means = f"LoRA {mean(found.lora):.1f}, full {mean(found.full):.1f}" if found.lora else ""
        return means if TASKS[task].metric == "bleu" else ""

    return by_task(rows, told)


def ten_times(rows: Rows) -> str:
    def told(task: str, leg: Leg) -> str:
        lora, full = (best_rate(rows, task, method, leg) for method in BOTH)
        return (
            f"{rate_text(lora)} against {rate_text(full)}: {lora / full:.2g} times" if lora and full else ""
        )

    return by_task(rows, told)


def kept_more(rows: Rows) -> str:
    def told(task: str, leg: Leg) -> str:
        found = others(rows, task, leg)
        return f"{verdict(found, words=KEPT)} ({apart(found)} nats)" if found.lora else ""

    return by_task(rows, told)


def compared(rows: Rows, *methods: str) -> str:
    """The methods from the least loss to the most."""
    losses = main_losses(rows, methods)
    if not losses:
        return ""
    order = sorted(methods, key=lambda method: mean(losses[method]))
    told = ", ".join(f"{METHODS[method].title} {mean(losses[method]):.3f}" for method in order)
    own = losses[LORA]
    return f"{told} (LoRA's own deviation between seeds is {stdev(own):.3f})" if len(own) > 1 else told


def places(rows: Rows) -> str:
    return compared(rows, LORA, "mlp-even", "attention-even")


def ranks(rows: Rows) -> str:
    return compared(rows, LORA, *(f"rank-{rank}" for rank in rows.setting.learned_ranks))


def high_rank(rows: Rows, other: str) -> str:
    return compared(rows, LORA, "rank-64", other) if 64 in rows.setting.learned_ranks else ""


def two_thirds(rows: Rows) -> str:
    told = []
    for dtype in ("bfloat16", "float32"):
        full, lora = (step_runs(rows, side, dtype) for side in ("full", "packed"))
        if full and lora:
            flop = lora[0]["flop"] / full[0]["flop"]
            time = mean(r["seconds"] for r in lora) / mean(r["seconds"] for r in full)
            told.append(f"{dtype}: {flop:.2f} of the operations, {time:.2f} of the time by the same layers")
    return "; ".join(told)


def small_share(rows: Rows) -> str:
    lora, full = (rows.get(Job("sizes", method=method)) for method in (LORA, FULL))
    return f"1/{full['trained'] / lora['trained']:.0f} of the values at rank 16" if lora and full else ""


ABSTRACT, POST = "its abstract", "readers' notes and copies of the post, not the post itself"
STATEMENTS = (
    Statement("Hu et al. 2021", "on par with or better than full fine-tuning", ABSTRACT, as_good),
    Statement(
        "Hu et al. 2021, GPT-2 M on E2E",
        "BLEU 70.4 with LoRA; 68.2 with full fine-tuning, a figure that it takes from Li and Liang 2021",
        "the authors' repository (microsoft/LoRA)",
        bleu,
    ),
    Statement("Hu et al. 2021, GPT-3 175B", "10,000 times fewer trained values", ABSTRACT, small_share),
    Statement(
        "Biderman et al. 2024, Llama 2 7B",
        "at usual ranks LoRA is substantially worse on code and mathematics",
        ABSTRACT,
        as_good,
    ),
    Statement("Biderman et al. 2024", "LoRA keeps more of what the base could", ABSTRACT, kept_more),
    Statement(
        "Biderman et al. 2024",
        "all linear layers are better than MLP alone, MLP than attention",
        "readers' notes, not the paper itself",
        places,
    ),
    Statement(
        "Schulman et al. 2025",
        "LoRA equals full fine-tuning on small and medium data",
        "the lab's documentation of Tinker",
        as_good,
    ),
    Statement(
        "Schulman et al. 2025",
        "LoRA's best rate is 10 times full's, about 15 times in short runs",
        POST,
        ten_times,
    ),
    Statement(
        "Schulman et al. 2025",
        "attention alone is worse, with as many values too",
        "the lab's documentation of Tinker",
        places,
    ),
    Statement(
        "Schulman et al. 2025",
        "as long as an adapter has room for the data, its rank hardly matters",
        POST,
        ranks,
    ),
    Statement(
        "Schulman et al. 2025",
        "slightly more than two thirds of the operations of full fine-tuning",
        POST,
        two_thirds,
    ),
    Statement(
        "Kalajdzievski 2023",
        "alpha/rank holds high ranks back; with alpha/sqrt(rank) they are better than low ones",
        ABSTRACT,
        lambda rows: high_rank(rows, "rslora-64"),
    ),
    Statement(
        "Hayou et al. 2024",
        "on wide models LoRA+ is 1 to 2 % better and up to twice as fast",
        ABSTRACT,
        lambda rows: high_rank(rows, "plus-64"),
    ),
)


def papers(rows: Rows) -> str:
    """The table."""
    lines: list[tuple[str, ...]] = []
    first: dict[str, str] = {}  # what was said before is not said again
    for one in STATEMENTS:
        told = one.here(rows)
        lines.append((one.paper, one.reports, one.read_in, first.get(told, told) or MISSING))
        first.setdefault(told, f"as for {one.paper}" if told else "")
    return markdown(("paper", "reports", "as read in", "here"), lines).replace("---:", "---")
