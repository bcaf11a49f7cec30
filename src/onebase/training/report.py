"""`report.html`: one self-contained page that says what a run did, to what, and what it was worth."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from jinja2 import Environment, FileSystemLoader, StrictUndefined
from markupsafe import Markup

from onebase.config import GATES, TrainConfig, flatten
from onebase.files import write_text
from onebase.training.curves import as_svg, draw_curves
from onebase.training.record import SHOWN_SAMPLES, Memory, RunRecord, Score

TEMPLATE = "report.html.j2"


class Change(NamedTuple):
    """A figure before and after training, and which way is better: "up" or "down"."""

    label: str
    before: float
    after: float
    unit: str
    better: str

    @property
    def verdict(self) -> str:
        """The CSS class of the second figure: good, bad or same; what is not a number is bad."""
        gain = self.after - self.before if self.better == "up" else self.before - self.after
        return "good" if gain > 0 else "same" if gain == 0 else "bad"


def write_report(record: RunRecord, metrics: Sequence[Mapping[str, Any]], path: str | Path) -> None:
    """Write the report on `record`, with curves from the lines of metrics.jsonl, as one HTML file at `path`.

    The page needs no script and no other file, and all text that came from the user is escaped.
    """
    environment = Environment(
        loader=FileSystemLoader(Path(__file__).parent),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    environment.filters |= {"count": count, "size": size, "duration": duration, "plain": plain}
    page = environment.get_template(TEMPLATE).render(
        run=record,
        changes=changes(record.before, record.after, wording(record)),
        words=wording(record),
        options=options(record.settings),
        gates=GATES,
        shown=SHOWN_SAMPLES,
        curves=_curves(metrics),
        memory=memory_verdict(record.memory),
    )
    write_text(path, page)


def _curves(metrics: Sequence[Mapping[str, Any]]) -> list[Markup]:
    """The curves for a page and for a phone; safe as markup, since they hold numbers and our own labels only."""
    steps = [event for event in metrics if event["kind"] == "step"]
    evals = [event for event in metrics if event["kind"] == "eval"]
    if not steps:
        return []
    return [Markup(as_svg(draw_curves(steps, evals, narrow), f"c{narrow:d}")) for narrow in (False, True)]


class Wording(NamedTuple):
    """How a task's results are told: its measures, the main one first, what "before" is, and the parts of a sample."""

    measures: tuple[tuple[str, str, str, str], ...]  # field of Score, label, unit, better
    before: str
    asked: str = "Prompt"
    wanted: str = "Reference"
    given: str = "answers"


WORDINGS: dict[str, Wording] = {
    "causal": Wording(
        (
            ("exact_match", "Exact match", "%", "up"),
            ("loss", "Loss per token", "nats", "down"),
            ("perplexity", "Perplexity", "", "down"),
        ),
        "base",
    ),
    "classify": Wording(
        (
            ("accuracy", "Accuracy", "%", "up"),
            ("macro_f1", "Macro F1", "%", "up"),
            ("loss", "Loss per row", "nats", "down"),
        ),
        "most frequent class",
    ),
    "regress": Wording(
        (
            ("loss", "Mean squared error", "", "down"),
            ("r2", "R²", "", "up"),
            ("pearson", "Correlation", "", "up"),
        ),
        "mean of the training rows",
    ),
    "embed": Wording(
        (
            ("accuracy_at_1", "Accuracy@1", "%", "up"),
            ("mrr_at_10", "MRR@10", "", "up"),
            ("loss", "Loss per pair", "nats", "down"),
        ),
        "base",
        "Anchor",
        "Positive",
        "anchors and the text that each finds nearest",
    ),
}


def wording(record: RunRecord) -> Wording:
    """How the results of this run are told."""
    return WORDINGS[record.settings.get("task", "causal")]


def changes(before: Score | None, after: Score | None, words: Wording = WORDINGS["causal"]) -> list[Change]:
    """What training changed on the held-out rows, the task's own metric first; empty without such rows."""
    found: list[Change] = []
    for field, label, unit, better in words.measures:
        one, two = getattr(before, field, None), getattr(after, field, None)
        if one is not None and two is not None:
            scale = 100 if unit == "%" else 1
            found.append(Change(label, scale * one, scale * two, unit, better))
    return found


def options(settings: Mapping[str, Any]) -> dict[str, dict[str, Any]]:
    """The settings, parted into those that the run "changed" and those left at their "default"."""
    defaults = flatten(TrainConfig())
    parts: dict[str, dict[str, Any]] = {"changed": {}, "default": {}}
    for name, value in settings.items():
        parts["default" if name in defaults and defaults[name] == value else "changed"][name] = value
    return parts


def memory_verdict(memory: Memory) -> str:
    """How far the measured peak lies from the prediction, in words."""
    if not memory.predicted_bytes:
        return "there was no prediction"
    ratio = memory.peak_bytes / memory.predicted_bytes - 1
    if abs(ratio) < 0.005:
        return "the peak met the prediction"
    return f"the peak was {abs(ratio):.0%} {'above' if ratio > 0 else 'below'} the prediction"


def _scaled(number: float, units: Mapping[int, str]) -> str:
    """`number` to three digits, with the unit of the largest power of ten in it; the last power is 0."""
    number = float(f"{number:.3g}")
    power = next(power for power in units if abs(number) >= 10**power or power == 0)
    digits = f"{number / 10**power:.3g}" if abs(number) < 1000 * 10**power else f"{number / 10**power:,.0f}"
    return f"{digits} {units[power]}".rstrip()


def count(number: float) -> str:
    """134515008 -> "135 M"; below ten thousand in full; "n/a" for what is not a number."""
    if not math.isfinite(number):
        return "n/a"
    if float(number).is_integer() and abs(number) < 10_000:
        return f"{number:,.0f}"
    return _scaled(number, {9: "B", 6: "M", 3: "k", 0: ""})


def size(number: float) -> str:
    """Bytes in decimal units, as file managers show them: 9799104 -> "9.8 MB"."""
    return _scaled(number, {9: "GB", 6: "MB", 3: "kB", 0: "bytes"})


def duration(seconds: float) -> str:
    """252.4 -> "4 min 12 s"; below ten seconds with one decimal; hours without seconds."""
    if seconds < 10:
        return f"{seconds:.1f} s"
    minutes, rest = divmod(round(seconds), 60)
    hours, minutes_left = divmod(minutes, 60)
    if hours:
        return f"{hours} h {minutes_left} min"
    return f"{minutes} min {rest} s" if minutes else f"{rest} s"


def plain(value: Any) -> str:
    """A setting or fact as a person would write it: lists with commas, numbers short, nothing as a dash."""
    if isinstance(value, bool):
        return "yes" if value else "no"
    if isinstance(value, Mapping):
        return plain([f"{name}={plain(item)}" for name, item in value.items()])
    if isinstance(value, list | tuple):
        return ", ".join(plain(item) for item in value) or "–"
    if isinstance(value, int):
        return f"{value:,}"
    if isinstance(value, float):
        return f"{value:.6g}" if math.isfinite(value) else "not a number"
    if value is None or value == "":
        return "–"
    text = str(value)
    return text if text == text.strip() else repr(text)  # a separator may be nothing but a newline
