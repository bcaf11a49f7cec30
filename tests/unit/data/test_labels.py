"""Labels: which classes there are and in which order, numbers, what cannot be learnt, and texts as ids."""

import random

import pytest
from hypothesis import given
from hypothesis import strategies as st

from labelled import ROWS
from onebase.config import DataConfig
from onebase.data.labels import Head, check_labels, describe_labels, encode_labelled, learn_head
from onebase.data.read import UNLABELLED, Example, read_examples
from onebase.errors import ConfigError, DataError, FormatError
from texts import tokenizer, write_rows

CLASSIFY = DataConfig(task="classify", holdout=0)


def examples(*labels):
    return [Example(row, text=f"text {row}", label=label) for row, label in enumerate(labels, 1)]


@pytest.mark.parametrize(
    ("labels", "classes"),
    [
        (["b", "a", "b", "C"], ("C", "a", "b")),
        ([10, 9, 10, -1], ("-1", "9", "10")),
        (["10", "9"], ("9", "10")),  # a CSV file knows no numbers
        ([True, False, True], ("false", "true")),
        (["10", "nan"], ("10", "nan")),
    ],
)
def test_classes_stand_in_one_order(labels, classes):
    assert learn_head("classify", examples(*labels)).labels == classes


@given(
    st.lists(st.sampled_from(["x", "y", "z", "10", "9"]), min_size=3).filter(
        lambda found: len(set(found)) > 1
    )
)
def test_the_order_of_rows_does_not_matter(labels):
    rows = examples(*labels)
    mixed = random.Random(1).sample(rows, len(rows))
    head = learn_head("classify", rows)
    assert learn_head("classify", mixed) == head
    assert dict(zip(head.labels, head.counts, strict=True)) == {
        name: labels.count(name) for name in set(labels)
    }
    coded = {row.row: row.label for row in encode_labelled(tokenizer(), mixed, head, CLASSIFY, 128).rows}
    assert [head.labels[int(coded[row.row])] for row in rows] == labels


@pytest.mark.parametrize(
    ("task", "labels", "told"),
    [
        ("classify", ["a", "a"], "all 2 training rows have the label 'a'"),
        ("classify", [1, "a"], "row 1 has a whole number, row 2 has text"),
        ("classify", [1, True], "row 1 has a whole number, row 2 has true or false"),
        ("classify", [1, 1.5], "row 2 has a number with a fraction"),
        ("classify", ["a", None], "row 2: it has no label"),
        ("regress", [1.0, float("nan")], "row 2: its label nan is no finite number"),
        ("regress", ["2.5", "many"], "row 2: its label 'many'"),
        ("regress", ["1", "inf"], "row 2: its label 'inf'"),
        ("regress", [True], "row 1: its label True"),
    ],
)
def test_labels_that_cannot_be_learnt_are_named(task, labels, told):
    rows = [
        Example(n, text="t", label=label) if label is not None else Example(n, text="t")
        for n, label in enumerate(labels, 1)
    ]
    with pytest.raises(DataError, match=told):
        learn_head(task, rows)


def test_a_class_that_training_never_saw_is_named():
    head = learn_head("classify", examples("good", "bad"))
    with pytest.raises(
        DataError, match=r"2 rows have one that no training row has: 'godd' in row 2.*\n.*good"
    ) as told:
        encode_labelled(tokenizer(), examples("good", "godd", "odd"), head, CLASSIFY, 128)
    assert "bad, good" in str(told.value)


def test_numbers_keep_their_value():
    rows = examples(1, 2.5, "-3e1")
    head = learn_head("regress", rows)
    coded = encode_labelled(tokenizer(), rows, head, CLASSIFY, 128)
    assert [row.label for row in coded.rows] == [1.0, 2.5, -30.0]
    assert head.mean == head.constant == pytest.approx((1 + 2.5 - 30) / 3)
    assert describe_labels(head, coded)["least"] == -30.0


def test_a_rare_class_is_a_gate():
    rows = examples("a", "a", "b", "c", "c")
    head = learn_head("classify", rows)
    (finding,) = check_labels(head, encode_labelled(tokenizer(), rows, head, CLASSIFY, 128))
    assert (finding.gate, finding.rows) == ("rare-class", (3,))
    assert "'b'" in finding.message


def test_texts_are_what_the_tokenizer_makes_of_them():
    pair = Example(1, text="one", text_pair="and two", label="a")
    (row,) = encode_labelled(tokenizer(), [pair], Head("classify", ("a", "b")), CLASSIFY, 128).rows
    assert row.ids == tokenizer()("one", "and two")["input_ids"]
    assert row.targets == 1
    assert not any(row.loss)
    assert row.without_targets().targets == 0
    with pytest.raises(DataError, match=r"empty in rows \[1\]"):
        encode_labelled(tokenizer(), [Example(1, text="")], None, CLASSIFY, 128)


def test_long_rows_are_refused_cut_or_left_out():
    rows = [Example(1, text="a " * 50, label="a"), Example(2, text="b", label="b")]
    head = learn_head("classify", rows)

    def lengths(**options):
        coded = encode_labelled(tokenizer(), rows, head, DataConfig(task="classify", **options), 128)
        return [(row.row, len(row.ids), row.truncated) for row in coded.rows]

    with pytest.raises(DataError, match="rows longer than 8 tokens: 1 of 2 rows"):
        lengths(max_length=8)
    assert lengths(max_length=8, overlong="truncate") == [(1, 8, True), (2, 1, False)]
    assert lengths(max_length=8, overlong="drop") == [(2, 1, False)]


@pytest.mark.parametrize(
    "head", [Head("classify", ("b", "a"), (3, 4)), Head("classify", ("x", "y")), Head("regress", mean=-1.5)]
)
def test_a_description_comes_back(head):
    assert Head.from_dict(head.as_dict()) == head


@pytest.mark.parametrize(
    "broken",
    [
        {},
        {"task": "classify", "id2label": {"1": "a"}, "rows": []},
        {"task": "classify", "id2label": {"0": 1}, "rows": []},
        {"task": "classify", "id2label": {"0": "a", "1": "a"}, "rows": []},
        {"task": "classify", "id2label": {"0": "a", "1": "b"}, "rows": [1]},
        {"task": "regress", "mean": "1"},
    ],
)
def test_a_broken_description_is_refused(broken):
    with pytest.raises(FormatError):
        Head.from_dict(broken)


def test_the_constant_answer_is_the_most_frequent_class():
    assert learn_head("classify", examples("b", "a", "a")).constant == "a"
    assert learn_head("classify", examples("b", "a")).constant == "a"  # the first of equals
    assert Head("classify", ("x", "y")).constant == "x"


def test_columns_are_found_by_the_task(tmp_path):
    file = write_rows(tmp_path / "rows.jsonl", [{"review": "fine", "stars": 4, "text": "x"}])
    config = DataConfig(task="classify", map="text=review,label=stars")
    assert read_examples(file, config) == [Example(1, text="fine", label=4)]
    assert read_examples(file, DataConfig()) == [Example(1, text="x")]  # other tasks see the text alone
    with pytest.raises(
        DataError, match=r"text and text_pair and label; text and label(.|\n)*--map text=review,label=stars"
    ):
        read_examples(
            write_rows(tmp_path / "b.jsonl", [{"review": "fine", "stars": 4}]), DataConfig(task="classify")
        )
    with pytest.raises(DataError, match="null in column 'label'"):
        read_examples(write_rows(tmp_path / "c.jsonl", [{"text": "a", "label": None}]), CLASSIFY)
    with pytest.raises(DataError, match="a list in column 'label', not a text"):
        read_examples(write_rows(tmp_path / "d.jsonl", [{"text": "a", "label": [1]}]), CLASSIFY)


def test_pairs_and_texts_without_label(tmp_path):
    rows = [{"text": "a", "text_pair": "b", "label": "yes"}]
    file = write_rows(tmp_path / "rows.jsonl", rows)
    assert read_examples(file, CLASSIFY) == [Example(1, text="a", text_pair="b", label="yes")]
    assert read_examples(file, DataConfig(), UNLABELLED) == [Example(1, text="a", text_pair="b")]
    assert read_examples(file, CLASSIFY)[0].kind == "labelled pair"
    assert len(ROWS) == 72


def test_options_that_make_no_sense_together():
    with pytest.raises(ConfigError, match="task=classify and chat"):
        DataConfig(task="classify", chat=True)
    with pytest.raises(ConfigError, match="causal, classify, regress"):
        DataConfig(task="rank")
