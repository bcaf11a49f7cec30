"""The page's pictures as SVG, each a function of the rows alone; the same rows give the same bytes."""

from __future__ import annotations

import io
from collections.abc import Callable
from statistics import mean, stdev
from typing import Any

import matplotlib as mpl
from matplotlib.figure import Figure

from benchmarks.evidence.lookup import (
    finals_of,
    main_losses,
    matrix_losses,
    other_loss,
    pair,
    scarce_curves,
)
from benchmarks.evidence.plan import BOTH, FULL, LORA, SHORT, Job, legs, tried, variants
from benchmarks.evidence.rows import Rows
from benchmarks.evidence.tasks import TASKS
from benchmarks.evidence.text import NAMES

COLOURS = {LORA: "#0072b2", FULL: "#d55e00", "base": "#777777"}  # told apart by colour-blind eyes too
STYLE = {
    "svg.hashsalt": "evidence",
    "svg.fonttype": "none",
    "font.size": 9,
    "axes.spines.top": False,
    "axes.spines.right": False,
}


def panels(count: int, width: float = 2.6, height: float = 2.5) -> tuple[Figure, list[Any]]:
    figure = Figure(figsize=(width * count, height), layout="constrained")
    return figure, list(figure.subplots(1, count, squeeze=False)[0])


def rates(rows: Rows) -> Figure:
    """Loss on the tuning rows against the learning rate, a panel a task; longer runs are broken lines."""
    figure, axes = panels(len(rows.setting.tasks))
    for axis, task in zip(axes, rows.setting.tasks, strict=True):
        for line, (leg, steps) in zip(("o-", "o--"), legs(rows.setting), strict=True):
            for method in BOTH:
                losses = tried(rows, task, method, leg).items()
                if found := sorted((rate, loss) for rate, loss in losses if loss != float("inf")):
                    label = f"{NAMES[method]}, {steps} steps"
                    axis.plot(*zip(*found, strict=True), line, color=COLOURS[method], label=label)
        axis.set(title=TASKS[task].title, xlabel="learning rate", xscale="log")
    axes[0].set_ylabel("loss, nats a token")
    _legend(axes[-1], figure)
    return figure


def quality(rows: Rows) -> Figure:
    """Held-out loss of both methods, short runs and longer ones; the same seed joined by a line."""
    figure, axes = panels(len(rows.setting.tasks))
    for axis, task in zip(axes, rows.setting.tasks, strict=True):
        ticks = []
        for number, (leg, steps) in enumerate(legs(rows.setting)):
            for place, method in enumerate(NAMES):
                losses = [found["test"][task] for found in finals_of(rows, task, method, leg)]
                axis.plot([2 * number + place] * len(losses), losses, "o", color=COLOURS[method])
                ticks.append(f"{'full' if method == FULL else 'LoRA'}\n{steps}")
            found = pair(rows, task, lambda f, t=task: f["test"][t], leg)
            for ends in zip(found.full, found.lora, strict=True):
                axis.plot([2 * number, 2 * number + 1], ends, color=COLOURS["base"], linewidth=0.8, zorder=0)
        axis.set(title=TASKS[task].title, xticks=range(len(ticks)), xlim=(-0.5, len(ticks) - 0.5))
        axis.set_xticklabels(ticks)
        axis.margins(y=0.25)
    axes[0].set_ylabel("held-out loss, nats a token")
    return figure


def forgetting(rows: Rows) -> Figure:
    """What was learnt against what the other tasks' loss became, a point a run; short runs are hollow."""
    figure, (axis,) = panels(1, 6.4, 3.2)
    tasks = rows.setting.tasks
    for leg, _ in reversed(legs(rows.setting)):  # the filled marks give the legend
        base = rows.get(Job(leg.base))
        for mark, task in zip("os^", tasks, strict=False):
            for method in BOTH if base else ():
                found = finals_of(rows, task, method, leg)
                learnt = [base["test"][task] - one["test"][task] for one in found]  # pyright: ignore[reportOptionalSubscript]
                changed = [other_loss(one, base, task, tasks) for one in found]  # pyright: ignore[reportArgumentType]
                face, label = (
                    ("none", "_")
                    if leg == SHORT
                    else (COLOURS[method], f"{TASKS[task].title}, {NAMES[method]}")
                )
                axis.plot(
                    learnt, changed, mark, color=COLOURS[method], markerfacecolor=face, alpha=0.7, label=label
                )
    axis.axhline(0, color=COLOURS["base"], linewidth=0.8)
    axis.set(xlabel="own task: fall of the loss, nats", ylabel="other tasks: change of loss, nats")
    _legend(axis, figure)
    return figure


def scarce(rows: Rows) -> Figure:
    """Loss on learnt rows (broken) and held-out ones (whole), a line a seed; a panel a number of rows."""
    figure, axes = panels(len(rows.setting.scarce), 2.3)
    for axis, count in zip(axes, rows.setting.scarce, strict=True):
        for method in BOTH:
            for number, curve in enumerate(scarce_curves(rows, method, count)):
                for part, line in (("test", "-"), ("train", "--")):
                    points = [(point["step"], point[part]) for point in curve]
                    label = f"{NAMES[method]}, {'held out' if part == 'test' else 'learnt rows'}"
                    told = "_" if number else label  # once in the legend
                    axis.plot(*zip(*points, strict=True), line, color=COLOURS[method], alpha=0.7, label=told)
        axis.set(title=f"{count:,} rows", xlabel="step")
    top = max((axis.get_ylim()[1] for axis in axes), default=1)
    for axis in axes:
        axis.set_ylim(0, top)
    axes[0].set_ylabel("loss, nats a token")
    _legend(axes[0], figure)
    return figure


def matrix(rows: Rows) -> Figure:
    """Held-out loss of each task (column) by each adapter (row), as a change of the base's."""
    figure, (axis,) = panels(1, 4.4, 3.2)
    found, tasks = matrix_losses(rows), rows.setting.tasks
    if "none" in found and (names := [task for task in tasks if task in found]):
        change = [[found[name][task] - found["none"][task] for task in tasks] for name in names]
        limit = max(abs(value) for line in change for value in line)
        axis.imshow(change, cmap="RdBu_r", vmin=-limit, vmax=limit)
        for y, line in enumerate(change):
            for x, value in enumerate(line):
                dark = abs(value) > 0.6 * limit
                axis.text(x, y, f"{value:+.2f}", ha="center", va="center", color="white" if dark else "black")
        axis.set_xticks(range(len(tasks)), [TASKS[task].title for task in tasks])
        axis.set_yticks(range(len(names)), [TASKS[name].title for name in names])
    axis.set(xlabel="loss on", ylabel="adapter of", title="change of the base's loss, nats")
    axis.spines[:].set_visible(False)
    return figure


MARKS = (  # mark, methods, label
    ("s", ("attention", "attention-even"), "attention only"),
    ("^", ("mlp", "mlp-even"), "MLP only"),
    ("v", ("rslora-64",), "rsLoRA, rank 64"),
    ("P", ("plus-64",), "LoRA+, rank 64"),
    ("D", (FULL,), "full fine-tuning"),
)


def where(rows: Rows) -> Figure:
    """Held-out loss against how much is trained, mean and deviation of the seeds: ranks as a line, places as points.

    Grey: as far as LoRA's own seeds are apart. Empty until all have been run.
    """
    figure, (axis,) = panels(1, 6.4, 3.2)
    axis.set(xlabel="trained values", ylabel="held-out loss, nats a token", xscale="log")
    losses = main_losses(rows, (FULL, LORA, *variants(rows.setting)))
    if not losses:
        return figure
    points = {name: _point(rows, name, losses[name]) for name in losses}
    axis.axhspan(min(losses[LORA]), max(losses[LORA]), color="#dddddd", zorder=0, label="LoRA's seeds")
    ranks = sorted([(rank, f"rank-{rank}") for rank in rows.setting.learned_ranks] + [(16, LORA)])
    line = [points[name] for _, name in ranks]
    axis.errorbar(
        *zip(*line, strict=True), fmt="o-", color=COLOURS[LORA], capsize=2, label="all linear, by rank"
    )
    for (rank, _), point in zip(ranks, line, strict=True):
        axis.annotate(f"{rank}", point[:2], (5, 4), textcoords="offset points", fontsize=7)
    for mark, group, label in MARKS:
        colour = COLOURS[FULL] if FULL in group else "#009e73"
        some = [points[name] for name in group]
        axis.errorbar(*zip(*some, strict=True), fmt=mark, color=colour, capsize=2, label=label)
    _legend(axis, figure)
    return figure


def _point(rows: Rows, method: str, losses: list[float]) -> tuple[int, float, float]:
    """Trained values, mean and standard deviation of the held-out loss."""
    trained = finals_of(rows, rows.setting.main_task, method)[0]["trained"]
    return trained, mean(losses), stdev(losses) if len(losses) > 1 else 0.0


def _legend(axis: Any, beside: Figure | None = None) -> None:
    """Inside the panel, or to the right of the figure where points could lie under it."""
    handles, labels = axis.get_legend_handles_labels()
    if labels and beside is None:
        axis.legend(frameon=False, fontsize=7)
    elif labels and beside is not None:
        beside.legend(handles, labels, loc="outside right center", frameon=False, fontsize=7)


PICTURES: dict[str, Callable[[Rows], Figure]] = {
    "rates": rates,
    "quality": quality,
    "forgetting": forgetting,
    "scarce": scarce,
    "matrix": matrix,
    "where": where,
}


def svg(rows: Rows, name: str) -> str:
    """A picture's text."""
    with mpl.rc_context(STYLE):
        stream = io.StringIO()
        PICTURES[name](rows).savefig(stream, format="svg", metadata={"Date": None})
    return "\n".join(line.rstrip() for line in stream.getvalue().splitlines()) + "\n"
