"""The numbers of the summary, and the text of the preview: loss, edges, specials, nothing interpreted."""

from __future__ import annotations

import io

from rich.console import Console

from onebase.config import DataConfig
from onebase.data.checks import Finding
from onebase.data.preview import print_preview, row_text, summarise
from onebase.data.read import Example
from onebase.data.template import Encoded, EncodedSet, encode


def encoded_set(*lengths: int) -> EncodedSet:
    rows = [Encoded(i, list(range(n)), [False] + [True] * (n - 1)) for i, n in enumerate(lengths, 1)]
    return EncodedSet(rows, dropped=(8, 9))


def test_the_summary_counts():
    examples = [Example(i, prompt=prompt, completion="a") for i, prompt in enumerate("aabcb", 1)]
    summary = summarise(examples, encoded_set(2, 4, 4, 6, 10), [])
    assert (summary.rows, summary.tokens, summary.loss_tokens) == (5, 26, 21)
    assert summary.share == 21 / 26
    assert (summary.shortest, summary.median, summary.p95, summary.longest) == (2, 4, 10, 10)
    assert (summary.truncated, summary.dropped) == (0, 2)
    assert summary.duplicates == 1
    assert summary.shared_prompts == 2
    lengths = summarise([], encoded_set(*range(1, 101)), [])
    assert (lengths.p95, lengths.median) == (95, 50.5)


def test_shared_prompts_of_chats_and_text():
    def chat(row: int, *contents: str) -> Example:
        roles = ("user", "assistant", "user", "assistant")
        turns = tuple({"role": r, "content": c} for r, c in zip(roles, contents, strict=False))
        return Example(row, messages=turns)

    chats = [chat(1, "q", "a"), chat(2, "q", "b"), chat(3, "q", "a", "r", "b"), chat(4, "q")]
    assert summarise(chats, encoded_set(3), []).shared_prompts == 1
    assert summarise([Example(1, text="a"), Example(2, text="a")], encoded_set(3), []).shared_prompts == 0


def test_a_row_shows_loss_edges_specials_and_line_breaks(gpt):
    row = Encoded(1, gpt("yes")["input_ids"] + gpt("\n")["input_ids"] + gpt(" no</s>")["input_ids"], [])
    row = row._replace(loss=[False] * (len(row.ids) - 2) + [True, True])
    text = row_text(gpt, row)
    assert text.plain.replace("·", "") == "yes⏎\n⟦ no</s>⟧"
    assert text.plain.count("·") == len(row.ids) - 1
    styles = {text.plain[span.start : span.end]: str(span.style) for span in text.spans}
    assert styles[" no"] == "bold green"
    assert styles["⏎\n"] == "dim"
    assert styles["</s>"] == "bold green underline"


def test_a_sentencepiece_row_keeps_its_spaces(spaced):
    ids = spaced("Is it true? yes, it is.")["input_ids"]
    plain = row_text(spaced, Encoded(1, ids, [False] * len(ids))).plain
    assert plain.replace("·", "") == "<s> Is it true? yes, it is."


def test_characters_of_several_tokens_come_out_whole(gpt):
    ids = gpt("é🙂x")["input_ids"]
    assert len(ids) > 3
    assert row_text(gpt, Encoded(1, ids, [False] * len(ids))).plain.replace("·", "") == "é🙂x"


def test_a_long_row_leaves_out_its_middle(gpt):
    ids = gpt("a" + "0" * 998 + "b")["input_ids"]
    plain = row_text(gpt, Encoded(1, ids, [True] * len(ids))).plain
    assert f"{len(ids) - 400} more tokens" in plain
    assert plain.startswith("⟦a")
    assert plain.endswith("b⟧")


def test_the_whole_preview(gpt):
    hostile = Example(4, prompt="[red]hi[/red] \x1b[31m", completion="[bold]yes[/nope]")
    encoded = encode(gpt, [hostile], DataConfig(), [2], 100)
    summary = summarise([hostile], encoded, [Finding("double-bos", (4,), "two of them")])
    console = Console(file=io.StringIO(), width=160)
    print_preview(console, gpt, encoded, summary, rows=3)
    printed = console.file.getvalue()
    assert "[red]hi[/red] " in printed.replace("·", "")
    assert "[bold]yes[/nope]" in printed.replace("·", "")
    assert "\x1b" not in printed
    assert "␛" in printed
    assert "✗ double-bos: two of them (1 row: 4)" in printed
    assert "✓ no-loss" in printed
    assert "uneven-targets" not in printed, "not a check on the data"
    assert "⟦loss⟧" in printed
    assert f"row 4: {len(encoded.rows[0].ids)} tokens" in printed
    bare = Console(file=io.StringIO(), width=160)
    print_preview(bare, gpt, encoded, summary, rows=0)
    assert "row 4:" not in bare.file.getvalue()
