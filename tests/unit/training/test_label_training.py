"""Training a head: what can be told apart is told apart, the base stays as it is, and a run goes on as it was."""

import json
import random

import pytest
import torch

from labelled import BASES, NUMBERS, ROWS, labelled_base
from onebase.data.labels import Head
from onebase.errors import BaseError, ConfigError, DataError, GateError
from onebase.evaluation import evaluate, evaluate_labels
from onebase.models.fingerprint import fingerprint_model
from onebase.prediction import predict
from onebase.storage.format import load_adapter, read_adapter
from onebase.training.run import train
from runs import assert_resumed_is_whole
from texts import write_rows

pytestmark = pytest.mark.slow

OPTIONS = {"task": "classify", "rank": 2, "lr": 5e-3, "batch_size": 8, "holdout": 12, "samples": 2}


@pytest.fixture(scope="module")
def files(tmp_path_factory):
    folder = tmp_path_factory.mktemp("rows")
    return {
        n: write_rows(folder / f"{n}.jsonl", rows) for n, rows in {"words": ROWS, "numbers": NUMBERS}.items()
    }


@pytest.mark.parametrize("name", BASES)
def test_what_can_be_told_apart_is(name, files, tmp_path):
    base = labelled_base(name)
    before = fingerprint_model(base.model)
    run = train(base, data=files["words"], output=str(tmp_path / "a"), epochs=10, **OPTIONS)
    assert fingerprint_model(base.model) == before
    assert run.record.proof.equal
    assert run.record.after.accuracy == run.record.after.macro_f1 == 1.0
    assert run.record.before.accuracy < 1.0
    assert [sample.after for sample in run.record.samples] == [one.reference for one in run.record.samples]
    adapter = load_adapter(tmp_path / "a", base)
    assert adapter == run.adapter
    assert adapter.origin.task == "SEQ_CLS"
    assert set(base.for_adapter(adapter).drawn) == set(adapter.full)
    told = json.loads((tmp_path / "a" / "onebase.json").read_text())["head"]
    assert told["id2label"] == {"0": "bad", "1": "good"}
    said = predict(base, ["Ada loves tea.", "Zoe hates tea."], adapter)
    assert [one.label for one in said] == ["good", "bad"]
    found, constant = evaluate_labels(base, files["words"], adapter)
    assert found == evaluate(base, files["words"], adapter)
    assert found.accuracy > 0.95  # its training rows too
    assert constant.accuracy == 0.5


def test_numbers_are_learnt(files, tmp_path):
    options = OPTIONS | {"task": "regress", "epochs": 20}
    run = train(labelled_base("bert"), data=files["numbers"], output=str(tmp_path / "a"), **options)
    assert run.record.after.r2 > 0.8
    assert run.record.after.pearson > 0.9
    assert run.record.after.loss < run.record.before.loss / 5


def test_a_resumed_run_equals_one_that_never_stopped(files, tmp_path):
    assert_resumed_is_whole(labelled_base, tmp_path, **OPTIONS, data=files["words"])


def test_the_head_starts_from_the_seed_and_rows_may_stand_in_any_order(files, tmp_path):
    base, head = labelled_base(), Head("classify", ("a", "b"))
    first, again, other = (base.with_head(head, seed).model.classifier.weight for seed in (1, 1, 2))
    assert torch.equal(first, again)
    assert not torch.equal(first, other)
    assert base.with_head(head).model.bert.encoder is base.model.encoder  # shared, not copied
    mixed = write_rows(tmp_path / "mixed.jsonl", random.Random(3).sample(ROWS, len(ROWS)))
    short = OPTIONS | {"max_steps": 1, "samples": 0}
    runs = [
        train(base, data=data, output=str(tmp_path / f"{n}"), **short)
        for n, data in enumerate((files["words"], mixed))
    ]
    assert [run.adapter.origin.head["id2label"] for run in runs] == [{"0": "bad", "1": "good"}] * 2


@pytest.mark.parametrize(
    ("rows", "options", "error", "told"),
    [
        ([{"text": f"t{n}", "label": "a"} for n in range(9)], {}, DataError, "all 7 training rows"),
        ([*ROWS, {"text": "x", "label": "odd"}], {"holdout": 0}, GateError, "rare-class"),
        (ROWS, {"engine": "packed"}, BaseError, "a label belongs to a whole row"),
        (ROWS, {"shard_base": True}, ConfigError, "shard_base"),
        ([{"text": "a"}], {}, DataError, "text and label"),
    ],
)
def test_what_cannot_be_trained_is_refused_before_anything_is_written(rows, options, error, told, tmp_path):
    data = write_rows(tmp_path / "rows.jsonl", rows)
    with pytest.raises(error, match=told):
        train(
            labelled_base(), output=str(tmp_path / "a"), **(OPTIONS | {"data": data, "holdout": 2} | options)
        )
    assert not list((tmp_path / "a").glob("*.safetensors"))


def test_validation_rows_of_another_class_are_refused(files, tmp_path):
    other = write_rows(tmp_path / "valid.jsonl", [{"text": "x", "label": "odd"}])
    with pytest.raises(DataError, match="no training row has: 'odd' in row 1"):
        train(labelled_base(), data=files["words"], validation=other, output=str(tmp_path / "a"), **OPTIONS)


def test_an_encoder_is_told_of_the_tasks_it_can_do(files, tmp_path):
    with pytest.raises(BaseError, match="--task classify"):
        train(labelled_base(), data=files["words"], output=str(tmp_path / "a"), task="causal")


def test_a_head_goes_on_from_its_adapter(files, tmp_path):
    base, short = labelled_base(), OPTIONS | {"max_steps": 2, "samples": 0}
    train(base, data=files["words"], output=str(tmp_path / "a"), **short)
    second = train(base, data=files["words"], output=str(tmp_path / "b"), start=str(tmp_path / "a"), **short)
    first = read_adapter(tmp_path / "a")
    assert second.adapter.origin.head == first.origin.head
    assert not torch.equal(first.full["classifier"]["weight"], second.adapter.full["classifier"]["weight"])
    other = write_rows(tmp_path / "other.jsonl", [{**row, "label": row["label"] + "!"} for row in ROWS])
    with pytest.raises(ConfigError, match="the adapter's labels are"):
        train(base, data=other, output=str(tmp_path / "c"), start=str(tmp_path / "a"), **short)
