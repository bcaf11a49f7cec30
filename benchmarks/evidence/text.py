"""Numbers as text: tables, spreads, verdicts."""

from __future__ import annotations

from collections.abc import Sequence
from statistics import mean, stdev

from benchmarks.evidence.lookup import Pair

MISSING = "not run"


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


def verdict(found: Pair, less_is_better: bool = True) -> str:
    """Who is better, by the sign of the difference in every seed."""
    apart = found.differences
    if not apart:
        return MISSING
    seeds = f"{len(apart)} of {len(apart)} seeds" if len(apart) > 1 else "one seed"
    if all(d == 0 for d in apart):
        return f"the same in {seeds}"
    if all(d <= 0 for d in apart) or all(d >= 0 for d in apart):
        lora = (mean(apart) < 0) == less_is_better
        return f"{'LoRA' if lora else 'full fine-tuning'} better in {seeds}"
    return "no clear winner: the sign changes with the seed"
