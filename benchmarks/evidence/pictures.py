"""The page's pictures as SVG, each a function of the rows alone; the same rows give the same bytes."""

from __future__ import annotations

import io
from collections.abc import Callable
from typing import Any, NamedTuple

import matplotlib as mpl
from matplotlib.figure import Figure

from benchmarks.evidence.lookup import finals_of, matrix_losses, other_loss, pair, scarce_curve
from benchmarks.evidence.plan import BOTH, FULL, LORA, Job, best_rate, tried
from benchmarks.evidence.rows import Rows
from benchmarks.evidence.settings import TUNING_SEED
from benchmarks.evidence.tasks import TASKS

COLOURS = {LORA: "#0072b2", FULL: "#d55e00", "base": "#777777"}  # told apart by colour-blind eyes too
NAMES = {LORA: "LoRA", FULL: "full fine-tuning"}
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
    """Loss on the tuning rows against the learning rate, a panel a task."""
    figure, axes = panels(len(rows.setting.tasks))
    for axis, task in zip(axes, rows.setting.tasks, strict=True):
        for method in BOTH:
            found = sorted(
                (rate, loss) for rate, loss in tried(rows, task, method).items() if loss != float("inf")
            )
            axis.plot(
                *zip(*found, strict=True), "o-", color=COLOURS[method], label=NAMES[method]
            ) if found else None
        axis.set(title=TASKS[task].title, xlabel="learning rate", xscale="log")
    axes[0].set_ylabel("loss, nats a token")
    _legend(axes[0])
    return figure


def quality(rows: Rows) -> Figure:
    """Held-out loss of both methods, the same seed joined by a line; the base's stands in the title."""
    figure, axes = panels(len(rows.setting.tasks))
    base = rows.get(Job("base"))
    for axis, task in zip(axes, rows.setting.tasks, strict=True):
        for place, method in enumerate((FULL, LORA)):
            losses = [found["test"][task] for found in finals_of(rows, task, method)]
            axis.plot([place] * len(losses), losses, "o", color=COLOURS[method])
        found = pair(rows, task, lambda f, t=task: f["test"][t])
        for ends in zip(found.full, found.lora, strict=True):
            axis.plot([0, 1], ends, color=COLOURS["base"], linewidth=0.8, zorder=0)
        told = f" (base: {base['test'][task]:.2f})" if base else ""
        axis.set(title=f"{TASKS[task].title}{told}", xticks=[0, 1], xlim=(-0.5, 1.5))
        axis.set_xticklabels(["full", "LoRA"])
        axis.margins(y=0.25)
    axes[0].set_ylabel("held-out loss, nats a token")
    return figure


def forgetting(rows: Rows) -> Figure:
    """What was learnt against what the other tasks' loss became, a point a run."""
    figure, (axis,) = panels(1, 6.4, 3.2)
    base, tasks = rows.get(Job("base")), rows.setting.tasks
    for mark, task in zip("os^", tasks, strict=False):
        for method in BOTH:
            found = finals_of(rows, task, method) if base else []
            learnt = [base["test"][task] - one["test"][task] for one in found]  # pyright: ignore[reportOptionalSubscript]
            others = [other_loss(one, base, task, tasks) for one in found]  # pyright: ignore[reportArgumentType]
            axis.plot(
                learnt,
                others,
                mark,
                color=COLOURS[method],
                alpha=0.7,
                label=f"{TASKS[task].title}, {NAMES[method]}",
            )
    axis.axhline(0, color=COLOURS["base"], linewidth=0.8)
    axis.set(xlabel="own task: fall of the loss, nats", ylabel="other tasks: change of loss, nats")
    _legend(axis, figure)
    return figure


def scarce(rows: Rows) -> Figure:
    """Loss on learnt rows (broken) and on held-out ones (whole) along training, a panel a number of rows."""
    figure, axes = panels(len(rows.setting.scarce), 2.3)
    for axis, count in zip(axes, rows.setting.scarce, strict=True):
        for method in BOTH:
            curve = scarce_curve(rows, method, count)
            for part, line in (("test", "-"), ("train", "--")):
                points = [(point["step"], point[part]) for point in curve]
                label = f"{NAMES[method]}, {'held out' if part == 'test' else 'learnt rows'}"
                axis.plot(
                    *zip(*points, strict=True), line, color=COLOURS[method], label=label
                ) if points else None
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


def where(rows: Rows) -> Figure:
    """Held-out loss against how much is trained, by the tuning seed: ranks as a line, places as points.

    Grey: as far as LoRA's reported seeds are apart, around the tuning seed's. Hollow: the search for a rate goes on.
    """
    figure, (axis,) = panels(1, 6.4, 3.2)
    task = rows.setting.main_task
    seeds = [found["test"][task] for found in finals_of(rows, task, LORA)]
    if (middle := _tuned_point(rows, LORA)) and len(seeds) > 1:
        half = (max(seeds) - min(seeds)) / 2
        axis.axhspan(middle.loss - half, middle.loss + half, color="#dddddd", zorder=0, label="LoRA's seeds")
    ranks = {f"rank-{rank}": rank for rank in rows.setting.learned_ranks} | {LORA: 16}
    line = sorted((found, rank) for name, rank in ranks.items() if (found := _tuned_point(rows, name)))
    if line:
        axis.plot(*zip(*(point[:2] for point, _ in line), strict=True), "-", color=COLOURS[LORA])
    for point, rank in line:
        axis.annotate(f"{rank}", point[:2], (0, 5), textcoords="offset points", ha="center", fontsize=7)
    for mark, group, label in (
        ("o", tuple(ranks), "all linear, by rank"),
        ("s", ("attention", "attention-even"), "attention only"),
        ("^", ("mlp", "mlp-even"), "MLP only"),
        ("v", ("rslora-64",), "rsLoRA, rank 64"),
        ("P", ("plus-64",), "LoRA+, rank 64"),
        ("D", (FULL,), "full fine-tuning"),
    ):
        colour = COLOURS[FULL] if FULL in group else COLOURS[LORA] if LORA in group else "#009e73"
        for point in [found for found in (_tuned_point(rows, name) for name in group) if found]:
            face = colour if point.settled else "none"
            axis.plot(point.trained, point.loss, mark, color=colour, markerfacecolor=face, label=label)
            label = "_"  # once in the legend
    axis.set(xlabel="trained values", ylabel="held-out loss, nats a token", xscale="log")
    _legend(axis, figure)
    return figure


class Point(NamedTuple):
    """A method by its tuning seed: trained values, held-out loss, whether its rate is settled."""

    trained: int
    loss: float
    settled: bool


def _tuned_point(rows: Rows, method: str) -> Point | None:
    task = rows.setting.main_task
    losses, settled = tried(rows, task, method), best_rate(rows, task, method)
    rate = settled or min(losses, key=losses.__getitem__, default=0.0)
    found = rows.get(Job("tune", task, method, rate, TUNING_SEED))
    return (
        Point(found["trained"], found["test"], settled is not None)
        if found and found["test"] is not None
        else None
    )


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
