"""The demo's data: labels that the text alone decides, balance, and the bytes of the committed file."""

import json
import re
from collections import Counter

import pytest

from onebase.demo import make_data, read_demo
from onebase.demo.make_data import PRODUCTS, TEMPLATES, URGENT

ORDER_ID = re.compile(r"\b[A-Z]\d{4}\b")


@pytest.fixture(scope="module")
def rows():
    return [json.loads(line) for line in read_demo().read_text(encoding="utf-8").splitlines()]


@pytest.fixture(scope="module")
def labels(rows):
    return [json.loads(row["completion"]) for row in rows]


def test_the_script_writes_the_packaged_bytes(tmp_path):
    make_data.main(["--output", str(tmp_path / "again.jsonl")])
    assert (tmp_path / "again.jsonl").read_bytes() == read_demo().read_bytes()


def test_another_seed_gives_other_rows():
    first, again, other = make_data.make_rows(1), make_data.make_rows(1), make_data.make_rows(2)
    assert first == again != other


def test_rows_are_distinct_short_and_marked_synthetic(rows):
    assert len(rows) == 480
    assert all(list(row) == ["prompt", "completion", "synthetic"] for row in rows)
    assert all(row["synthetic"] is True for row in rows)
    assert len({row["prompt"] for row in rows}) == len(rows)
    assert all(15 <= len(row["prompt"].split()) <= 45 for row in rows)


def test_no_prompt_has_an_unfilled_field_or_a_double_space(rows):
    assert not [row["prompt"] for row in rows if re.search(r"[{}]|  |^ | $", row["prompt"])]


def test_completions_are_compact_json_with_fixed_keys_and_closed_sets(rows, labels):
    for row, label in zip(rows, labels, strict=True):
        assert list(label) == ["intent", "product", "order", "urgent"]
        assert label["intent"] in TEMPLATES
        assert label["product"] in PRODUCTS
        assert label["urgent"] in (True, False)
        assert row["completion"] == json.dumps(label, separators=(",", ":"))


def test_the_text_alone_decides_product_order_and_urgency(rows, labels):
    for prompt, label in zip((row["prompt"] for row in rows), labels, strict=True):
        assert [word for word in PRODUCTS if re.search(rf"\b{word}\b", prompt)] == [label["product"]]
        assert ORDER_ID.findall(prompt) == ([label["order"]] if label["order"] else [])
        assert any(clause in prompt for clause in URGENT) == label["urgent"]


def test_the_template_decides_the_intent(rows, labels):
    """A message holds the fixed words of templates of its own intent only."""
    shapes = {
        intent: [re.compile(re.sub(r"\\\{\w+\\\}", ".+", re.escape(text))) for text in texts]
        for intent, texts in TEMPLATES.items()
    }
    for row, label in zip(rows, labels, strict=True):
        found = [
            intent for intent, texts in shapes.items() if any(text.search(row["prompt"]) for text in texts)
        ]
        assert found == [label["intent"]]


def test_labels_are_balanced(labels):
    assert set(Counter(label["intent"] for label in labels).values()) == {80}
    assert set(Counter(label["product"] for label in labels).values()) == {48}
    assert 0.35 <= sum(label["urgent"] for label in labels) / len(labels) <= 0.55
    assert 0.15 <= sum(label["order"] is None for label in labels) / len(labels) <= 0.40
    orders = [label["order"] for label in labels if label["order"]]
    assert len(set(orders)) > 0.95 * len(orders)


def test_every_intent_has_many_phrasings_that_are_unlike_each_other():
    texts = [text for group in TEMPLATES.values() for text in group]
    assert all(len(group) >= 10 for group in TEMPLATES.values())
    assert len({re.sub(r"\W+", " ", text.lower()) for text in texts}) == len(texts)
