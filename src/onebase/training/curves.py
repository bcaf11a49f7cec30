"""The learning curves of a run as one figure: loss, learning rate, gradient norm."""

from __future__ import annotations

import io
import re
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from threading import Lock
from typing import TYPE_CHECKING, Any

import numpy as np

from onebase.files import atomic_file

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure
    from numpy.typing import NDArray

# matplotlib takes most of a second to import, and every command would pay that: hence imports in functions.

# Each colour has a role. In an SVG it becomes `var(--chart-<role>, <colour>)`, so that a page can set it.
COLOURS = {
    "ink": "#4b5563",
    "grid": "#e5e7e9",
    "train": "#3b6fd4",
    "validation": "#c2571b",
    "aside": "#6b7f99",
}
FACE = "system-ui, -apple-system, 'Segoe UI', Roboto, 'Helvetica Neue', Arial, sans-serif"

# (width, height) in inches and the panels' places, for a page and for a phone.
Layout = tuple[tuple[float, float], list[Any]]
WIDE: Layout = ((9.6, 3.9), [["loss", "loss", "lr"], ["loss", "loss", "grad_norm"]])
NARROW: Layout = ((4.0, 6.6), [["loss"], ["loss"], ["lr"], ["grad_norm"]])
# matplotlib takes some SVG options only as settings of the whole process: one thread at a time sets them.
_SVG_OPTIONS = Lock()
# More points than a figure has pixels only make the file large.
MOST_POINTS = 1200


def draw_curves(
    steps: Sequence[Mapping[str, Any]], evals: Sequence[Mapping[str, Any]], narrow: bool = False
) -> Figure:
    """Draw the "step" and "eval" lines of metrics.jsonl; a missing or null value is a gap in its curve.

    `narrow` stacks the panels for a column about 400 pixels wide.
    """
    from matplotlib.backends.backend_agg import FigureCanvasAgg  # noqa: PLC0415
    from matplotlib.figure import Figure  # noqa: PLC0415
    from matplotlib.layout_engine import ConstrainedLayoutEngine  # noqa: PLC0415

    size, panels = NARROW if narrow else WIDE
    figure = Figure(figsize=size, layout=ConstrainedLayoutEngine(wspace=0.06, hspace=0.06))
    FigureCanvasAgg(figure)
    axes = figure.subplot_mosaic(panels)
    _draw_loss(axes["loss"], steps, evals)
    for name, title in (("lr", "Learning rate"), ("grad_norm", "Gradient norm")):
        _plot(axes[name], steps, name, color=COLOURS["aside"], linewidth=1.2)
        _style(axes[name], title)
        axes[name].set_ylim(bottom=0)
    for name in ("loss", "grad_norm"):
        axes[name].set_xlabel("step", fontsize=8.5, color=COLOURS["ink"])
    # Lay it out once: each further drawing would shift things by a hair, and the SVG would differ.
    figure.draw_without_rendering()
    figure.set_layout_engine("none")
    return figure


def save_png(figure: Figure, path: str | Path) -> None:
    """Write `figure` as a PNG, whole or not at all."""
    with atomic_file(path) as temporary:
        figure.savefig(temporary, format="png", dpi=150, facecolor="white")


def as_svg(figure: Figure, name: str = "curves") -> str:
    """`figure` as an `<svg>` element to put into a page: the same text for the same figure.

    Text stays text in the page's own fonts, the ground is transparent, and colours are CSS variables named
    `--chart-<role>`. `name` starts all ids, so that a page can hold several figures.
    """
    from matplotlib import rc_context  # noqa: PLC0415

    nothing = dict.fromkeys(("Date", "Creator", "Format", "Type"))
    buffer = io.StringIO()
    with _SVG_OPTIONS, rc_context({"svg.hashsalt": name, "svg.fonttype": "none"}):
        figure.savefig(buffer, format="svg", transparent=True, metadata=nothing)
    svg = buffer.getvalue()
    svg = svg[svg.index("<svg") :].rstrip()  # a page takes no XML prolog
    svg = re.sub(r'(\bid="|url\(#|href="#)', rf"\g<1>{name}-", svg)
    svg = re.sub(r"'DejaVu Sans'[^;\"]*", FACE, svg)
    # Rules inside an inlined figure would hold for the whole page.
    svg = re.sub(r"<defs>\s*<style.*?</defs>", "", svg, count=1, flags=re.DOTALL)
    for role, colour in COLOURS.items():
        svg = svg.replace(colour, f"var(--chart-{role}, {colour})")
    return svg


def _draw_loss(axis: Axes, steps: Sequence[Mapping[str, Any]], evals: Sequence[Mapping[str, Any]]) -> None:
    if steps:
        _plot(axis, steps, "loss", color=COLOURS["train"], alpha=0.3, linewidth=0.8)
        x, y = _points(steps, "loss")
        smooth = [{"step": a, "loss": b} for a, b in zip(x, smoothed(y), strict=True)]
        _plot(axis, smooth, "loss", color=COLOURS["train"], linewidth=1.8, label="training (smoothed)")
    if evals:
        dots: dict[str, Any] = {"marker": "o", "markersize": 4.5, "linewidth": 1.0}
        _plot(axis, evals, "loss", color=COLOURS["validation"], label="validation", **dots)
    _style(axis, "Loss per token (nats)")
    if steps or evals:
        axis.legend(frameon=False, fontsize=8.5, labelcolor=COLOURS["ink"], loc="upper right")


def _plot(axis: Axes, events: Sequence[Mapping[str, Any]], name: str, **style: Any) -> None:
    x, y = _thinned(*_points(events, name))
    if len(x) == 1:
        style["marker"] = "o"  # a line through one point shows nothing
    axis.plot(x, y, **style)


def _style(axis: Axes, title: str) -> None:
    axis.set_title(title, loc="left", fontsize=9, fontweight="bold", color=COLOURS["ink"])
    axis.grid(axis="y", color=COLOURS["grid"], linewidth=0.8)
    axis.set_axisbelow(True)
    axis.tick_params(length=0, labelsize=8.5, colors=COLOURS["ink"])
    axis.locator_params(axis="x", nbins=6, integer=True)
    axis.locator_params(axis="y", nbins=5)
    axis.yaxis.set_major_formatter("{x:g}")
    for side, spine in axis.spines.items():
        spine.set(visible=side == "bottom", color=COLOURS["grid"])


def _points(
    events: Iterable[Mapping[str, Any]], name: str
) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
    """(steps, values), both float64; a null or absent value is NaN, which matplotlib leaves out."""
    pairs = [(event["step"], event.get(name)) for event in events]
    table = np.array(pairs, dtype=np.float64).reshape(-1, 2)
    return table[:, 0], table[:, 1]


def smoothed(values: NDArray[np.float64]) -> NDArray[np.float64]:
    """Centred moving average over about a twentieth of the run; NaN values carry no weight.

    Centred, since TensorBoard's exponential average lags behind a falling loss.
    """
    window = np.ones(2 * (len(values) // 40) + 1)
    known = np.isfinite(values)
    weight = np.convolve(known.astype(np.float64), window, mode="same")
    total = np.convolve(np.where(known, values, 0.0), window, mode="same")
    return np.divide(total, weight, out=np.full_like(total, np.nan), where=weight > 0)


def _thinned(
    x: NDArray[np.float64], y: NDArray[np.float64]
) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
    """At most about MOST_POINTS of the points: the lowest and highest of each stretch, so that spikes stay."""
    if len(x) <= MOST_POINTS:
        return x, y
    keep: set[int] = {0, len(x) - 1}
    for stretch in np.array_split(np.arange(len(x)), MOST_POINTS // 2):
        known = stretch[np.isfinite(y[stretch])]
        if len(known):
            keep |= {int(known[y[known].argmin()]), int(known[y[known].argmax()])}
    order = sorted(keep)
    return x[order], y[order]
