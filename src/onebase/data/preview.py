"""What the model will see: a table of the data, and the first rows token by token with their loss in colour."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from statistics import median

from rich.console import Console
from rich.table import Table
from rich.text import Text

from onebase.config import GATES
from onebase.data.checks import FIXES, KIND_OF, Finding, describe
from onebase.data.pairs import NAMES, split_row
from onebase.data.read import Example
from onebase.data.template import Encoded, EncodedSet, Tokenizer

LOSS, REST, SPECIAL, EDGE = "bold green", "dim", "underline", "cyan"
SHOWN = 400  # tokens of one row; of a longer one the middle is left out
LABELS = 40  # classes in the table
# What several rows may have in common, by what they teach.
SHARED = {
    "text": "prompts in several rows",
    "labels": "texts in several rows",
    "pairs": "anchors in several rows",
}
WINDOW = 8  # tokens decoded before the one that is shown, so that its space and its bytes come out right

# Control characters as their Unicode pictures: a row must not move the cursor or colour the terminal.
VISIBLE = {
    **{code: chr(0x2400 + code) for code in range(32)},
    **dict.fromkeys(range(0x7F, 0xA0), "\ufffd"),
    ord("\n"): "⏎\n",
}


@dataclass(frozen=True)
class DataSummary:
    """Numbers about encoded rows. Lengths are tokens of a row or of each of its texts; `share` is loss tokens / tokens.

    `duplicates`: rows whose ids an earlier row has. `shared_prompts`: prompts that more than one row has; such
    rows can leak into the validation rows unless the split is by prompt.
    """

    rows: int
    tokens: int
    loss_tokens: int
    share: float
    shortest: int
    median: float
    p95: int
    longest: int
    truncated: int
    dropped: int
    duplicates: int
    shared_prompts: int
    findings: tuple[Finding, ...]
    labels: Mapping[str, float]  # rows by class, or the spread of numbers; empty where rows have no label
    pairs: Mapping[
        str, int
    ]  # how many there are, and of how many texts; empty where rows teach something else

    @property
    def kind(self) -> str:
        """What the rows teach: labels, pairs or text."""
        return "labels" if self.labels else "pairs" if self.pairs else "text"

    @property
    def classes(self) -> list[str]:
        """The classes of labelled rows, in the head's order; none where labels are numbers, which are not counted."""
        return [name for name, value in self.labels.items() if isinstance(value, int)]


def summarise(
    examples: Sequence[Example],
    encoded: EncodedSet,
    findings: Sequence[Finding],
    labels: Mapping[str, float] | None = None,
    pairs: Mapping[str, int] | None = None,
) -> DataSummary:
    """The summary of `encoded`, which was made of `examples` and has at least one row."""
    lengths = sorted(len(part.ids) for row in encoded.rows for part in split_row(row))
    tokens, loss = sum(lengths), sum(row.targets for row in encoded.rows)
    prompts = Counter(key for key in map(_prompt_key, examples) if key is not None)
    return DataSummary(
        rows=len(encoded.rows),
        tokens=tokens,
        loss_tokens=loss,
        share=loss / max(tokens, 1),
        shortest=lengths[0],
        median=median(lengths),
        p95=lengths[math.ceil(0.95 * len(lengths)) - 1],
        longest=lengths[-1],
        truncated=len(encoded.truncated),
        dropped=len(encoded.dropped),
        duplicates=len(encoded.rows) - len({tuple(row.ids) for row in encoded.rows}),
        shared_prompts=sum(count > 1 for count in prompts.values()),
        findings=tuple(findings),
        labels=labels or {},
        pairs=pairs or {},
    )


def _prompt_key(example: Example) -> object:
    if example.anchor is not None:
        return example.anchor
    if example.messages is None:
        return example.prompt if example.label is None else (example.text, example.text_pair)
    answered = example.messages[-1]["role"] == "assistant"
    history = example.messages[:-1] if answered else example.messages
    return tuple((message["role"], message["content"]) for message in history)


def print_preview(
    console: Console, tokenizer: Tokenizer, encoded: EncodedSet, summary: DataSummary, rows: int
) -> None:
    """Print the summary, the gates, and the first `rows` rows token by token."""
    console.print(_table(summary))
    console.print(_gates(summary))
    if rows and summary.kind == "text":
        console.print(_legend())
    for row in encoded.rows[:rows]:
        console.print(_title(row, summary.classes))
        for name, part in zip(NAMES, split_row(row), strict=False):
            console.print(Text(f"{name}: " if row.parts else "", EDGE) + row_text(tokenizer, part))


def _table(summary: DataSummary) -> Table:
    lengths = (summary.shortest, summary.median, summary.p95, summary.longest)
    cells = {
        "rows": f"{summary.rows:,}",
        "tokens": f"{summary.tokens:,}",
        **_targets(summary),
        "length: min, median, p95, max": ", ".join(f"{length:,.6g}" for length in lengths),
        "truncated, dropped rows": f"{summary.truncated:,}, {summary.dropped:,}",
        "duplicate rows": f"{summary.duplicates:,}",
        SHARED[summary.kind]: f"{summary.shared_prompts:,}",
    }
    table = Table(title="data", show_header=False)
    for name, cell in cells.items():
        table.add_row(name, cell)
    return table


def _targets(summary: DataSummary) -> dict[str, str]:
    """What there is to learn: tokens with loss, or labels."""
    if summary.pairs:
        return {name: f"{count:,}" for name, count in summary.pairs.items()}
    if not summary.labels:
        return {"tokens with loss": f"{summary.loss_tokens:,} ({summary.share:.0%})"}
    shown = [f"{name}: {value:,.6g}" for name, value in summary.labels.items()]
    more = [f"... {len(shown) - LABELS} more"] if len(shown) > LABELS else []
    return {"labels": "\n".join([*shown[:LABELS], *more])}


def _gates(summary: DataSummary) -> Text:
    """One line a gate: the data gates that passed, and each finding."""
    failed = {finding.gate: finding for finding in summary.findings}
    text = Text()
    for gate in GATES:
        if gate in failed:
            text.append(f"✗ {gate}: {describe(failed[gate])}\n", "red")
        elif gate in FIXES and KIND_OF.get(gate, "text") == summary.kind:
            text.append(f"✓ {gate}\n", "green")
    return text


def _legend() -> Text:
    parts = (("⟦loss⟧", LOSS), ("no loss", REST), ("special token", SPECIAL), ("· token edge", EDGE))
    return Text("  ").join(Text(name, style) for name, style in parts)


def _title(row: Encoded, classes: Sequence[str]) -> Text:
    cut = ", truncated" if row.truncated else ""
    told = f"{len(row.parts)} texts" if row.parts else f"{sum(row.loss)} with loss"
    if row.label is not None:
        told = f"label {classes[int(row.label)] if classes else f'{row.label:g}'}"
    return Text(f"\nrow {row.row}: {len(row.ids)} tokens, {told}{cut}", "bold")


def row_text(tokenizer: Tokenizer, row: Encoded) -> Text:
    """The row's tokens with `·` between them, loss in `⟦ ⟧` and green, special tokens by name, newlines as ⏎."""
    text, before = Text(), False
    special = set(tokenizer.all_special_ids)
    for index in range(len(row.ids)):
        hidden = len(row.ids) - SHOWN
        if hidden > 0 and SHOWN // 2 <= index < SHOWN // 2 + hidden:
            if index == SHOWN // 2:
                text.append(f" ... {hidden:,} more tokens ... ", EDGE)
            continue
        carries = row.loss[index]
        text.append("⟧" if before and not carries else "", LOSS)
        text.append("·" if index else "", EDGE)
        text.append("⟦" if carries and not before else "", LOSS)
        style = f"{LOSS if carries else REST}{' ' + SPECIAL if row.ids[index] in special else ''}"
        text.append(_token_text(tokenizer, row.ids, index).translate(VISIBLE), style)
        before = carries
    return text.append("⟧" if before else "", LOSS)


def _token_text(tokenizer: Tokenizer, ids: Sequence[int], index: int) -> str:
    """What token `index` adds to the decoded text; a character of several tokens is shown at its last one."""
    if ids[index] in tokenizer.added_tokens_decoder:
        return str(tokenizer.convert_ids_to_tokens(ids[index]))
    start = max(0, index - WINDOW)
    before, now = (
        str(tokenizer.decode(list(ids[start:end]), clean_up_tokenization_spaces=False))
        for end in (index, index + 1)
    )
    whole = now if index + 1 == len(ids) else now.rstrip("\ufffd")
    return whole[len(before.rstrip("\ufffd")) :]
