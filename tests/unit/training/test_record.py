"""metrics.jsonl holds each step once and only valid JSON; a record survives JSON unchanged."""

import dataclasses
import json
import math
from pathlib import Path

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from onebase.errors import FormatError, OnebaseError, OutputError
from onebase.training.record import (
    AdapterFacts,
    MetricsFile,
    Proof,
    RunRecord,
    Sample,
    Score,
    Timing,
    json_ready,
)

floats = st.floats(allow_nan=False, allow_infinity=False)
json_values = st.recursive(
    st.none() | st.booleans() | st.integers() | floats | st.text(), lambda inner: st.lists(inner, max_size=3)
)
facts = st.dictionaries(st.text(), json_values, max_size=3)
scores = st.none() | st.builds(Score, floats, floats, st.none() | floats)
records = st.builds(
    RunRecord,
    adapter=st.builds(AdapterFacts, alpha=floats),
    proof=st.builds(Proof, seconds=floats),
    timing=st.builds(Timing, seconds=floats, tokens_per_second=floats),
    before=scores,
    after=scores,
    **dict.fromkeys(("settings", "data", "machine", "versions"), facts),
)


@pytest.fixture
def metrics(tmp_path: Path) -> MetricsFile:
    return MetricsFile(tmp_path / "run" / "metrics.jsonl")


def step(number: int, loss: float = 1.5) -> dict:
    return {"kind": "step", "step": number, "loss": loss}


def test_lines_come_back_as_they_were(metrics):
    assert metrics.read() == []
    events = [step(1, 0.1 + 0.2), {"kind": "eval", "step": 1, "loss": 1e-300, "perplexity": 1.0}, step(2)]
    for number, event in enumerate(events, 1):
        metrics.append(event)
        assert len(metrics.path.read_text().splitlines()) == number  # each is in the file at once
    assert metrics.read() == events


def test_nan_and_infinity_become_null(metrics):
    metrics.append({"kind": "step", "step": 3, "loss": math.nan, "grad_norm": math.inf, "more": [-math.inf]})
    text = metrics.path.read_text()
    json.loads(text, parse_constant=lambda name: pytest.fail(f"{name} is not JSON"))
    assert metrics.read() == [{"kind": "step", "step": 3, "loss": None, "grad_norm": None, "more": [None]}]


def test_truncate_drops_later_steps_and_their_evaluations(metrics):
    kept = [step(1), step(2), {"kind": "eval", "step": 2, "loss": 2.0}]
    for event in [*kept, step(3), {"kind": "eval", "step": 3, "loss": 1.0}]:
        metrics.append(event)
    metrics.truncate_after(2)
    assert metrics.read() == kept
    metrics.append(step(3, 9.0))
    assert metrics.read() == [*kept, step(3, 9.0)]
    assert [path.name for path in metrics.path.parent.iterdir()] == ["metrics.jsonl"]


def test_truncate_without_a_file_makes_none(metrics):
    metrics.truncate_after(5)
    assert not metrics.path.exists()


@pytest.mark.parametrize("cut", range(1, 40, 7))
def test_half_a_last_line_is_dropped(metrics, cut):
    metrics.append(step(1))
    whole = metrics.path.read_bytes()
    metrics.append(step(2))
    metrics.path.write_bytes(metrics.path.read_bytes()[: len(whole) + cut])
    assert metrics.read() == [step(1)]
    metrics.truncate_after(2)
    assert metrics.path.read_bytes() == whole


@pytest.mark.parametrize("line", ["{", "[1]", '{"kind": "step"}', '{"step": "one"}', "\0\0"])
def test_a_broken_line_is_named(metrics, line):
    metrics.append(step(1))
    with metrics.path.open("a") as file:
        file.write(line + "\n")
    with pytest.raises(FormatError, match="line 2 of"):
        metrics.read()


def test_an_unwritable_place_is_an_output_error(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(OutputError, match="cannot write"):
        MetricsFile(tmp_path / "file" / "metrics.jsonl").append(step(1))


@settings(max_examples=40, suppress_health_check=[HealthCheck.too_slow])
@given(records)
def test_a_record_survives_json(record):
    text = json.dumps(record.as_dict(), allow_nan=False)
    again = RunRecord.from_dict(json.loads(text))
    assert again == record
    assert type(again.samples) is tuple
    assert again.proof.equal is record.proof.equal


@settings(max_examples=5, suppress_health_check=[HealthCheck.too_slow])
@given(records)
def test_a_diverged_loss_survives_as_not_a_number(record):
    record = dataclasses.replace(record, after=Score(math.nan, math.inf))
    again = RunRecord.from_dict(json.loads(json.dumps(record.as_dict(), allow_nan=False)))
    assert math.isnan(again.after.loss)
    assert again.after.perplexity is None  # null, as of a task that has none
    assert again.after.exact_match is None


def broken(values: dict, path: str, value: object) -> dict:
    """`values` with the entry at the dotted `path` set, or removed where `value` is `...`."""
    values = json.loads(json.dumps(values))
    *parents, last = path.split(".")
    place = values
    for name in parents:
        place = place[name]
    if value is ...:
        del place[last]
    else:
        place[last] = value
    return values


@pytest.mark.parametrize(
    ("path", "value", "message"),
    [
        ("titel", "x", r"record\.titel: no such field\n.*title"),
        ("base.dtype", ..., r"record\.base: lacks the fields dtype"),
        ("base.parameters", 1.5, r"record\.base\.parameters: is 1.5, not a whole number"),
        ("adapter.rslora", 1, r"record\.adapter\.rslora: is 1, not true or false"),
        ("timing.seconds", "3", r"record\.timing\.seconds: is '3', not a number"),
        ("samples", [3], r"record\.samples\[0\]: is 3, not an object"),
        ("coverage", {}, r"record\.coverage: is \{\}, not a list"),
        ("settings", [], r"record\.settings: is \[\], not an object"),
    ],
)
@settings(max_examples=1, suppress_health_check=list(HealthCheck))
@given(record=records)
def test_a_wrong_field_is_named(record, path, value, message):
    with pytest.raises(FormatError, match=message):
        RunRecord.from_dict(broken(record.as_dict(), path, value))


def test_a_record_that_is_no_object_is_an_error():
    with pytest.raises(OnebaseError, match="record: is 3, not an object"):
        RunRecord.from_dict(3)  # type: ignore[arg-type]


def test_proof_and_matches():
    assert Proof("a", "a", 3, 0.1).equal
    assert not Proof("a", "b", 3, 0.1).equal
    sample = Sample("p", " yes\n", "no", "yes ")
    assert (sample.matches(sample.before), sample.matches(sample.after)) == (False, True)
    assert not Sample("p", "", "", "").matches("")  # no reference, nothing to match


def test_json_ready_keeps_what_json_knows():
    assert json_ready({1: (True, 2, 0.5, "x", None)}) == {"1": [True, 2, 0.5, "x", None]}
