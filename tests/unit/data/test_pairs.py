"""Pairs and triplets: how rows are read, what is a false negative, which rows are refused, what a preview shows."""

import io

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from rich.console import Console

from onebase.config import DataConfig
from onebase.data.pairs import check_pairs, columns, describe_pairs, encode_pairs, false_negatives, split_row
from onebase.data.preview import print_preview, summarise
from onebase.data.read import Example, read_examples
from onebase.data.template import Encoded
from onebase.errors import ConfigError, DataError
from texts import tokenizer, write_rows

EMBED = DataConfig(task="embed", holdout=0)


def row(*texts, number=1):
    ids = [token for text in texts for token in text]
    return Encoded(number, ids, [False] * len(ids), parts=tuple(map(len, texts)))


def encoded(rows, **options):
    examples = [Example(number, **fields) for number, fields in enumerate(rows, 1)]
    return encode_pairs(tokenizer(), examples, DataConfig(task="embed", holdout=0, **options), 128)


def test_a_row_holds_its_texts_end_to_end():
    words = tokenizer()
    texts = ("Ada bought tea.", "Tea went to Ada", "Ben bought tea")
    (made,) = encoded([dict(zip(("anchor", "positive", "negative"), texts, strict=True))]).rows
    assert [part.ids for part in split_row(made)] == [words(text)["input_ids"] for text in texts]
    assert made.targets == 1
    assert columns([made]) == [[tuple(words(text)["input_ids"])] for text in texts]


@given(st.lists(st.lists(st.integers(0, 9), min_size=1, max_size=5), min_size=2, max_size=3))
def test_splitting_undoes_joining(texts):
    assert [part.ids for part in split_row(row(*texts))] == texts


def test_a_row_of_one_text_is_not_split():
    plain = Encoded(1, [1, 2, 3], [False, True, True])
    assert split_row(plain) == [plain]


@pytest.mark.parametrize(
    ("rows", "kind"),
    [
        ([{"anchor": "a", "positive": "b", "negative": "c"}], "triplet"),
        ([{"anchor": "a", "positive": "b", "label": 1}], "positive pair"),
    ],
)
def test_the_columns_say_which_kind_it_is(rows, kind, tmp_path):
    (example,) = read_examples(write_rows(tmp_path / "a.jsonl", rows), EMBED)
    assert example.kind == kind


def test_other_names_are_offered_as_a_map(tmp_path):
    path = write_rows(tmp_path / "a.jsonl", [{"query": "a", "answer": "b"}])
    with pytest.raises(DataError, match="--map anchor=query,positive=answer"):
        read_examples(path, EMBED)
    mapped = DataConfig(task="embed", map="anchor=query,positive=answer")
    assert read_examples(path, mapped) == [Example(1, anchor="a", positive="b")]
    with pytest.raises(DataError, match="anchor=COLUMN,positive=COLUMN"):
        read_examples(write_rows(tmp_path / "b.jsonl", [{"x": "a"}]), EMBED)


def test_a_list_is_no_text(tmp_path):
    path = write_rows(tmp_path / "a.jsonl", [{"anchor": ["a"], "positive": ["b"]}])
    with pytest.raises(DataError, match="row 1 has a list in column 'anchor'"):
        read_examples(path, EMBED)


# a, b, c, d: texts of one token
A, B, C, D = [1], [2], [3], [4]


@pytest.mark.parametrize(
    ("rows", "wanted"),
    [
        ([row(A, B), row(C, D)], [[0, 0], [0, 0]]),
        ([row(A, B), row(C, B)], [[0, 1], [1, 0]]),  # the same positive
        ([row(A, B), row(A, C)], [[0, 1], [1, 0]]),  # the same anchor: either positive is right
        ([row(A, B), row(C, A)], [[0, 1], [0, 0]]),  # the anchor itself
        # B is paired with A: A may find B, and B finds A's positive, which is its own text
        ([row(A, B), row(B, C)], [[0, 0], [1, 0]]),
        # each one's negative is the other's positive
        ([row(A, B, C), row(D, C, B)], [[0, 0, 0, 1], [0, 0, 1, 0]]),
    ],
)
def test_what_is_known_to_be_right_is_no_negative(rows, wanted):
    assert torch.equal(false_negatives(rows), torch.tensor(wanted).bool())


def test_gates_name_rows_that_teach_nothing():
    words = tokenizer()
    rows = [
        {"anchor": "Ada", "positive": "Ben"},
        {"anchor": "Ada", "positive": "Ada"},
        {"anchor": "</s>", "positive": "Cleo"},
    ]
    found = {one.gate: one.rows for one in check_pairs(encoded(rows), words.all_special_ids)}
    assert found == {"empty-text": (3,), "same-text": (2,)}
    negative = [{"anchor": "Ada", "positive": "Ben", "negative": "Ben"}]
    assert [one.gate for one in check_pairs(encoded(negative), words.all_special_ids)] == ["same-text"]


def test_a_text_of_nothing_is_refused():
    with pytest.raises(DataError, match=r"the text is empty in rows \[2\]"):
        encoded([{"anchor": "Ada", "positive": "Ben"}, {"anchor": "Ada", "positive": ""}])


def test_each_text_has_the_longest_length():
    rows = [{"anchor": "Ada", "positive": "Ben"}, {"anchor": "Ada", "positive": "Ben bought a kettle today"}]
    with pytest.raises(DataError, match="rows longer than 8 tokens"):
        encoded(rows, max_length=8)
    cut = encoded(rows, max_length=8, overlong="truncate")
    assert cut.truncated == (2,)
    assert cut.rows[1].parts[1] == 8
    dropped = encoded(rows, max_length=8, overlong="drop")
    assert [one.row for one in dropped.rows] == [1]
    assert dropped.dropped == (2,)
    with pytest.raises(ConfigError, match="max_length=200"):
        encoded(rows, max_length=200)


def test_the_preview_shows_each_text():
    rows = [{"anchor": "Ada bought tea", "positive": "Tea for Ada"}] * 2 + [
        {"anchor": "Ben", "positive": "Cleo"}
    ]
    examples = [Example(number, **fields) for number, fields in enumerate(rows, 1)]
    made = encode_pairs(tokenizer(), examples, EMBED, 128)
    summary = summarise(examples, made, [], pairs=describe_pairs(made))
    assert summary.pairs == {"pairs": 3, "different texts": 4, "texts in several rows": 2}
    assert (summary.kind, summary.shared_prompts, summary.duplicates) == ("pairs", 1, 1)
    assert summary.longest == max(len(tokenizer()(text)["input_ids"]) for text in rows[0].values())
    stream = io.StringIO()
    print_preview(Console(file=stream, width=200), tokenizer(), made, summary, 1)
    shown = stream.getvalue()
    assert "anchor: " in shown
    assert "positive: " in shown
    assert "✓ same-text" in shown
    assert "no-eos" not in shown
    assert "⟦" not in shown
