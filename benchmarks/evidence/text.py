"""Numbers as text: tables, spreads, verdicts."""

from __future__ import annotations

from collections.abc import Sequence
from statistics import mean, stdev

from benchmarks.evidence.lookup import Pair
from benchmarks.evidence.plan import FULL, LORA

MISSING = "not run"
NAMES = {FULL: "full fine-tuning", LORA: "LoRA"}  # in the order of the tables


def markdown(head: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """A table; the first column is text, the others stand on the right."""
    if not rows:
        return f"*{MISSING.capitalize()}.*"
    line = ["---", *["---:"] * (len(head) - 1)]
    return "\n".join("| " + " | ".join(cells) + " |" for cells in (head, line, *rows))


def spread(values: Sequence[float], digits: int = 3) -> str:
    """Mean ± standard deviation over seeds; one alone as it is."""
    if not values:
        return MISSING
    told = f"{mean(values):.{digits}f}"
    return f"{told} ± {stdev(values):.{digits}f}" if len(values) > 1 else f"{told} (one seed)"


def megabytes(count: float) -> str:
    return f"{count / 1e6:,.1f}"


def rate_text(rate: float | None) -> str:
    return MISSING if rate is None else f"{rate:.0e}".replace("e-0", "e-")


def verdict(found: Pair, less_is_better: bool = True, words: tuple[str, str] = ("better", "better")) -> str:
    """Who is better, in how many of the seeds that both have; `words`: of LoRA and of full fine-tuning.

    A difference of 0 counts for nobody. Where both are better somewhere there is no winner.
    """
    apart = [-d if less_is_better else d for d in found.differences]
    if not apart:
        return MISSING
    count = len(apart)
    seeds = f"of {count} seeds" if count > 1 else "of 1 seed"
    wins, losses = sum(d > 0 for d in apart), sum(d < 0 for d in apart)
    if wins and losses:
        return f"mixed: LoRA {words[0]} in {wins}, full fine-tuning in {losses} {seeds}"
    if not wins and not losses:
        return f"level in {count} {seeds}"
    who, won = (f"LoRA {words[0]}", wins) if wins else (f"full fine-tuning {words[1]}", losses)
    level = f", level in {count - won}" if won < count else ""
    return f"{who} in {won} {seeds}{level}"


def apart(found: Pair, digits: int = 3) -> str:
    """LoRA minus full fine-tuning, the mean over seeds, with its sign."""
    return f"{mean(found.differences):+.{digits}f}" if found.differences else MISSING
