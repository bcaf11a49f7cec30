"""Scores: the loss against transformers' own, answers against values worked out by hand."""

import math

import pytest
import torch

from adapters import trained
from onebase.adapters.adapter import Origin
from onebase.adapters.injection import injected
from onebase.config import DataConfig, LoraConfig, Sampling
from onebase.data.read import Example
from onebase.data.template import PromptFormat, encode
from onebase.evaluation import (
    Scores,
    evaluate,
    grouped_references,
    mean_loss,
    text_scores,
)
from onebase.models.scoring import choose, scorer
from texts import CHATS, QUESTIONS, TEXTS, text_base, write_rows

SHORT = Sampling(max_new_tokens=5)


@pytest.fixture(scope="module")
def base():
    return text_base()


@pytest.fixture(scope="module")
def adapter(base):
    return trained(base.model, LoraConfig(rank=4, alpha=8))


def examples(rows):
    return [Example(number, **row) for number, row in enumerate(rows, 1)]


def encoded(base, rows, **options):
    return encode(base.tokenizer, examples(rows), DataConfig(**options), base.stop_ids, base.context).rows


def theirs(model, rows):
    """transformers' own loss, row by row with labels, weighted by each row's targets."""
    total, count = 0.0, 0
    for row in rows:
        labels = [token if carries else -100 for token, carries in zip(row.ids, row.loss, strict=True)]
        with torch.no_grad():
            loss = model(input_ids=torch.tensor([row.ids]), labels=torch.tensor([labels])).loss
        total, count = total + float(loss) * sum(row.loss), count + sum(row.loss)
    return total / count, count


@pytest.mark.parametrize("way", ["packed", "padded"])
@pytest.mark.parametrize("batch_size", [1, 4, 100])
def test_mean_loss_is_transformers(base, way, batch_size):
    rows = encoded(base, QUESTIONS)
    chosen = choose(base, way, None)
    assert chosen.name == way
    loss, count = mean_loss(scorer(base, chosen, "none"), rows, batch_size)
    expected = theirs(base.model, rows)
    assert (loss, count) == (pytest.approx(expected[0], rel=1e-5), expected[1])
    assert mean_loss(scorer(base, chosen, "none"), [], 4) == (0.0, 0)


@pytest.mark.parametrize("rows", [QUESTIONS[:6], CHATS[:6], TEXTS[:6]], ids=["plain", "chat", "text"])
def test_evaluate_with_an_adapter_and_without(base, adapter, rows):
    plain, tuned = (evaluate(base, examples(rows), chosen) for chosen in (None, adapter))
    expected = theirs(base.model, encoded(base, rows))
    assert plain == Scores(pytest.approx(expected[0], rel=1e-5), expected[1])
    with injected(base.model, adapter):
        expected = theirs(base.model, encoded(base, rows))
    assert tuned == Scores(pytest.approx(expected[0], rel=1e-5), expected[1])
    assert abs(plain.loss - tuned.loss) > 0.01
    assert tuned.perplexity == pytest.approx(math.exp(tuned.loss))


def test_options_and_files(base, tmp_path):
    path = write_rows(
        tmp_path / "rows.jsonl", [{"q": row["prompt"], "a": row["completion"]} for row in QUESTIONS]
    )
    options = {"map": "prompt=q,completion=a", "chat": True, "limit": 5}
    expected = theirs(base.model, encoded(base, QUESTIONS[:5], chat=True))
    scores = evaluate(base, path, **options)
    assert (scores.loss, scores.tokens) == (pytest.approx(expected[0], rel=1e-5), expected[1])


def test_answers_are_scored_once_for_each_prompt(base):
    rows = [QUESTIONS[0], QUESTIONS[9], QUESTIONS[1]]  # the first two ask the same
    given = evaluate(base, examples(rows), None, SHORT).answers
    assert len(given) == 2
    known = [{"prompt": rows[0]["prompt"], "completion": given[0]}, *rows[1:]]
    scores = evaluate(base, examples(known), None, SHORT)
    assert scores.answers == given
    assert scores.exact_match == 0.5
    assert scores.bleu is not None
    assert scores.chrf is not None


def test_an_adapter_is_asked_as_it_was_trained(base, adapter):
    """A format that training stored decides; without one (a peer's adapter), the options that score it."""
    row = examples(QUESTIONS[:1])
    chat = type(adapter)(adapter.config, adapter.lowrank, {}, Origin(prompt=PromptFormat(True).as_dict()))
    answers = {
        "stored": evaluate(base, row, chat, SHORT).answers,
        "chat": evaluate(base, row, adapter, SHORT, chat=True).answers,
        "plain": evaluate(base, row, adapter, SHORT).answers,
    }
    assert answers["stored"] == answers["chat"] != answers["plain"]


def test_text_rows_have_no_answers(base):
    scores = evaluate(base, examples(TEXTS[:3]), None, SHORT)
    assert (scores.exact_match, scores.bleu, scores.chrf, scores.answers) == (None, None, None, ())
    mixed = evaluate(base, examples([CHATS[0], TEXTS[0]]), None, SHORT)
    assert len(mixed.answers) == 1


def test_references_are_grouped_by_prompt():
    rows = examples(
        [
            {"prompt": "p", "completion": "1"},
            {"prompt": "q", "completion": "2"},
            {"prompt": "p", "completion": "3"},
            {"text": "no prompt"},
            CHATS[0],
            CHATS[1],
            CHATS[9],
            {"messages": [{"role": "user", "content": "no answer"}]},
        ]
    )
    found = [[(example.row, text) for example, text in group] for group in grouped_references(rows)]
    assert found == [
        [(1, "1"), (3, "3")],
        [(2, "2")],
        [(5, "Ada has bought a kettle."), (7, "Ada has bought two warm coats.")],
        [(6, "Ben has bought a kettle.")],
    ]


# BLEU is 100 times the fourth root of the product of the 1- to 4-gram precisions (both are of equal length).
BY_HAND = {
    "one reference": (["a b c d e f"], [["a b c d x f"]], 0.0, 100 * (5 / 6 * 3 / 5 * 2 / 4 * 1 / 3) ** 0.25),
    "a second one": (
        ["a b c d e f"],
        [["a b c d x f", "d e f g h i"]],
        0.0,
        100 * (6 / 6 * 5 / 5 * 3 / 4 * 1 / 3) ** 0.25,
    ),
    "some have fewer": (
        ["a b c d e f", "u v w x y z"],
        [["a b c d x f", "d e f g h i"], ["u v w x y z"]],
        0.5,
        100 * (12 / 12 * 10 / 10 * 7 / 8 * 4 / 6) ** 0.25,
    ),
    "the second fits, spaces aside": ([" a b c d\n"], [["no", "a b c d"]], 1.0, 100.0),
    "too short": (["a b c d"], [["a b c d e"]], 0.0, 100 * math.exp(1 - 5 / 4)),
    "nothing right": (["a b c d"], [["p q r s"]], 0.0, pytest.approx(0, abs=20)),
}


@pytest.mark.parametrize("case", BY_HAND)
def test_text_scores_by_hand(case):
    given, references, exact, bleu = BY_HAND[case]
    found = text_scores(given, references)
    assert found[:2] == (exact, pytest.approx(bleu) if isinstance(bleu, float) else bleu)
    assert 0 <= found[2] <= 100
    assert (found[2] > 99.9) == (case == "the second fits, spaces aside")
