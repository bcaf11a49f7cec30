"""Training vectors: what belongs together is found, the base stays as it is, and a run goes on as it was."""

import json

import pytest
import torch

from labelled import labelled_base
from onebase.embedding import embed
from onebase.errors import BaseError, ConfigError, DataError, GateError
from onebase.evaluation import evaluate, evaluate_pairs
from onebase.models.fingerprint import fingerprint_model
from onebase.storage.format import load_adapter, read_adapter
from onebase.training.run import train
from paired import PAIRS, TRIPLETS
from runs import assert_resumed_is_whole
from texts import text_base, write_rows

pytestmark = pytest.mark.slow

OPTIONS = {"task": "embed", "rank": 4, "lr": 5e-3, "batch_size": 12, "holdout": 9, "samples": 3}


def base_of(name):
    return text_base() if name == "llama" else labelled_base(name)


@pytest.fixture(scope="module")
def files(tmp_path_factory):
    folder = tmp_path_factory.mktemp("rows")
    return {
        n: write_rows(folder / f"{n}.jsonl", r) for n, r in {"pairs": PAIRS, "triplets": TRIPLETS}.items()
    }


@pytest.mark.parametrize(
    ("name", "rows", "pooling"),
    [
        ("bert", "pairs", ""),
        ("llama", "triplets", "last"),
        ("distilbert", "pairs", "cls"),
        ("roberta", "triplets", ""),
    ],
)
def test_what_belongs_together_is_found(name, rows, pooling, files, tmp_path):
    base = base_of(name)
    before = fingerprint_model(base.model)
    options = OPTIONS | {"holdout": 0, "epochs": 60, "pooling": pooling}
    run = train(base, data=files[rows], output=str(tmp_path / "a"), **options)
    assert fingerprint_model(base.model) == before
    assert run.record.proof.equal
    adapter = load_adapter(tmp_path / "a", base)
    assert adapter == run.adapter
    assert adapter.origin.task == "FEATURE_EXTRACTION"
    assert not any("pooler" in path for path in adapter.lowrank)
    told = json.loads((tmp_path / "a" / "onebase.json").read_text())["head"]
    wanted = {"pooling": pooling or "mean", "normalize": False, "scale": 20.0, "longest": 0}
    assert told == {"task": "embed", **wanted}
    found = evaluate(base, files[rows], adapter)
    assert found == evaluate_pairs(base, files[rows], adapter)
    plain = evaluate(base, files[rows], task="embed", pooling=pooling)
    assert found.accuracy_at_1 > 0.8
    assert plain.accuracy_at_1 < 0.2
    assert found.loss < plain.loss / 3
    assert not torch.equal(embed(base, ["Ada bought tea."], adapter), embed(base, ["Ada bought tea."]))


def test_it_carries_over_to_pairs_that_were_held_out(files, tmp_path):
    options = OPTIONS | {"epochs": 40, "data": files["pairs"]}
    record = train(labelled_base(), output=str(tmp_path / "a"), **options).record
    assert record.before.accuracy_at_1 < 0.2
    assert record.after.accuracy_at_1 > 0.5
    assert record.after.mrr_at_10 > record.before.mrr_at_10 + 0.3
    assert record.after.loss < record.before.loss / 2


def test_report_and_card_say_what_was_done(files, tmp_path):
    run = train(labelled_base(), data=files["pairs"], output=str(tmp_path / "a"), max_steps=2, **OPTIONS)
    assert len(run.record.samples) == 3
    anchors = [row["anchor"] for row in PAIRS]
    for sample in run.record.samples:
        assert sample.reference == PAIRS[anchors.index(sample.prompt)]["positive"]
        assert {sample.before, sample.after} <= {row["positive"] for row in PAIRS}
    card = (tmp_path / "a" / "README.md").read_text()
    assert "onebase embed --adapter a" in card
    assert "sentence-similarity" in card
    assert "AutoModel.from_pretrained" in card
    assert "mean of its real tokens' last hidden states; vectors" in card
    report = (tmp_path / "a" / "report.html").read_text()
    for told in ("Accuracy@1", "MRR@10", "Loss per pair", "the other texts of the batch", "<h4>Anchor</h4>"):
        assert told in report


def test_a_resumed_run_equals_one_that_never_stopped(files, tmp_path):
    assert_resumed_is_whole(labelled_base, tmp_path, **OPTIONS, data=files["pairs"])


@pytest.mark.parametrize(
    ("rows", "options", "error", "told"),
    [
        ([{"anchor": f"t{n}", "positive": f"t{n}"} for n in range(9)], {}, GateError, "same-text"),
        ([*PAIRS, {"anchor": "</s>", "positive": "x"}], {"holdout": 0}, GateError, "empty-text"),
        ([{"anchor": "", "positive": "x"}, *PAIRS], {"holdout": 0}, DataError, "text is empty"),
        ([*PAIRS, {"anchor": "x " * 99, "positive": "x"}], {"holdout": 0}, DataError, "longer than 128"),
        ([{"text": "a", "label": 1}], {}, DataError, "anchor and positive"),
        (PAIRS, {"engine": "packed"}, BaseError, "a vector belongs to a whole text"),
        (PAIRS, {"shard_base": True}, ConfigError, "shard_base"),
        (PAIRS, {"batch_size": 1}, ConfigError, "batch_size=1"),
        (PAIRS, {"init": "lora_ga"}, ConfigError, "init=lora_ga: it looks at rows one at a time"),
        (PAIRS, {"group_prompts": True}, ConfigError, "task=embed and group_prompts"),
        (PAIRS, {"pooling": "sum"}, ConfigError, "pooling"),
        (PAIRS, {"similarity_scale": 0.0}, ConfigError, "similarity_scale"),
        (PAIRS, {"target_modules": "re:pooler.*"}, LookupError, "takes no part in making vectors"),
    ],
)
def test_what_cannot_be_trained_is_refused_before_anything_is_written(rows, options, error, told, tmp_path):
    data = write_rows(tmp_path / "rows.jsonl", rows)
    given = OPTIONS | {"data": data, "holdout": 2, "max_steps": 1} | options
    with pytest.raises(error, match=told):
        train(labelled_base(), output=str(tmp_path / "a"), **given)
    assert not list((tmp_path / "a").glob("*.safetensors"))


def test_a_gate_may_be_passed_by_name(tmp_path):
    """SimCSE's pairs: a text twice, told apart from the others by dropout."""
    data = write_rows(
        tmp_path / "rows.jsonl", [{"anchor": r["anchor"], "positive": r["anchor"]} for r in PAIRS]
    )
    options = OPTIONS | {"allow": "same-text", "dropout": 0.1, "max_steps": 1, "data": data}
    run = train(labelled_base(), output=str(tmp_path / "a"), **options)
    assert run.record.allowed == ("same-text",)


def test_vectors_go_on_from_their_adapter(files, tmp_path):
    base, short = labelled_base(), OPTIONS | {"max_steps": 2, "samples": 0}
    train(base, data=files["pairs"], output=str(tmp_path / "a"), **short)
    second = train(base, data=files["pairs"], output=str(tmp_path / "b"), start=str(tmp_path / "a"), **short)
    first = read_adapter(tmp_path / "a")
    assert second.adapter.origin.head == first.origin.head
    path = next(iter(first.lowrank))
    assert not torch.equal(first.lowrank[path].B, second.adapter.lowrank[path].B)
