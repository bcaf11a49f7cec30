"""A run's folder, its proof that the base is unchanged, and what it refuses."""

import hashlib
import json
import os
from pathlib import Path

import pytest
import torch
import yaml
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from onebase.adapters.injection import adapter_names
from onebase.adapters.layers import LoraLayer
from onebase.config import TrainConfig, build, flatten
from onebase.errors import (
    ConfigError,
    DataError,
    Diverged,
    FormatError,
    GateError,
    MissingFile,
    OutputError,
    OutputExists,
    TargetError,
)
from onebase.evaluation import evaluate
from onebase.files import process_lock
from onebase.models.generation import generate
from onebase.storage.format import load_adapter, read_adapter
from onebase.training.loop import Stepped
from onebase.training.record import RunRecord
from onebase.training.run import LOCK, METRICS, OPTIONS, read_config, train
from texts import CHATS, QUESTIONS, TEXTS, save_base, text_base, write_rows

pytestmark = pytest.mark.slow

SMALL = {
    "rank": 2,
    "lr": 1e-2,
    "batch_size": 4,
    "max_steps": 3,
    "holdout": 3,
    "samples": 0,
    "target_modules": "q_proj",
}
# What `finish` needs most of its time for is in every whole run; so the whole runs are few.


@pytest.fixture(scope="module")
def base():
    return text_base()


@pytest.fixture(scope="module")
def files(tmp_path_factory):
    folder = tmp_path_factory.mktemp("rows")
    kinds = {"questions": QUESTIONS, "chats": CHATS, "texts": TEXTS}
    return {name: write_rows(folder / f"{name}.jsonl", rows) for name, rows in kinds.items()}


def bits(model):
    """A digest of all that the model holds, and the names under which it does."""
    found = hashlib.sha256()
    for name, tensor in model.state_dict().items():
        found.update(name.encode() + tensor.numpy().tobytes())
    return found.hexdigest()


def clean(model):
    """No adapter, no wrapper, nothing to train, no mode changed."""
    return (
        not adapter_names(model)
        and not any(isinstance(module, LoraLayer) for module in model.modules())
        and not any(p.requires_grad or p.grad is not None for p in model.parameters())
        and not any(module.training for module in model.modules())
        and model.config._attn_implementation == "sdpa"
    )


@pytest.fixture(scope="module")
def done(base, files, tmp_path_factory):
    """A whole run with samples, an overridden gate and TensorBoard."""
    folder = tmp_path_factory.mktemp("done") / "my run"
    before, state = bits(base.model), torch.get_rng_state()
    options = SMALL | {
        "samples": 2,
        "eval_every": 1,
        "allow": "no-eos",
        "teach_eos": False,
        "log": "tensorboard",
    }
    result = train(base, data=files["questions"], output=str(folder), **options)
    assert torch.equal(torch.get_rng_state(), state)
    return result, before, options | {"data": files["questions"], "output": str(folder), "base": "tiny"}


def test_the_folder_holds_the_run(base, done):
    result, _, options = done
    folder = result.folder
    assert {path.name for path in folder.iterdir()} == {
        "adapter_config.json",
        "adapter_model.safetensors",
        "onebase.json",
        "checkpoints",
        "curves.png",
        LOCK,
        METRICS,
        OPTIONS,
        "README.md",
        "report.html",
        "run.json",
        "tensorboard",
    }
    stored = yaml.safe_load((folder / OPTIONS).read_text())
    assert build(TrainConfig, stored) == build(TrainConfig, options)
    assert flatten(build(TrainConfig, stored)) == stored
    assert RunRecord.from_dict(json.loads((folder / "run.json").read_text())) == result.record
    assert (folder / "curves.png").read_bytes()[:8] == b"\x89PNG\r\n\x1a\n"
    report, card = (folder / "report.html").read_text(), (folder / "README.md").read_text()
    assert base.fingerprint in report
    assert base.fingerprint in card
    assert card.startswith("---\nbase_model: tiny\n")
    assert load_adapter(folder, base) == result.adapter == read_adapter(folder)


def test_the_record_tells_the_truth(base, done):
    result, _, options = done
    record = result.record
    assert (record.title, record.base.name, record.base.fingerprint) == ("my run", "tiny", base.fingerprint)
    assert record.proof.before == record.proof.after == base.fingerprint
    assert record.proof.tensors == len(base.model.state_dict())
    assert record.allowed == ("no-eos",)
    assert record.way == "engine"
    assert record.adapter.parameters == result.adapter.parameters == 2 * 2 * (32 + 32)
    assert record.adapter.targets == "q_proj"
    assert record.adapter.file_bytes == (result.folder / "adapter_model.safetensors").stat().st_size
    assert record.settings == flatten(build(TrainConfig, options))
    assert record.data["rows"] == 24
    assert record.data["held-out rows"] == 3
    assert record.timing.steps == 3
    assert record.finished.startswith("all steps were done")
    origin = result.adapter.origin
    assert (origin.base, origin.fingerprint, origin.task) == ("tiny", base.fingerprint, "CAUSAL_LM")
    assert origin.prompt == {"chat": False, "system": "", "separator": "\n"}


def test_scores_and_samples_are_the_adapters(base, done):
    """The loss before and after is that of the held-out rows, measured again from the saved folder."""
    result, _, _ = done
    record, losses = result.record, []
    for line in (result.folder / METRICS).read_text().splitlines():
        event = json.loads(line)
        losses += [event["loss"]] if event["kind"] == "eval" else []
    assert record.before.loss == pytest.approx(losses[0], rel=1e-6)
    assert record.after.loss == pytest.approx(min(losses), rel=1e-6)
    assert len(record.samples) == 2
    for sample in record.samples:
        assert {"prompt": sample.prompt, "completion": sample.reference} in QUESTIONS
        rows = [row for row in QUESTIONS if row["prompt"] == sample.prompt]
        assert rows
    again = generate(base, [sample.prompt for sample in record.samples], result.adapter)
    for answer, sample in zip(again, record.samples, strict=True):
        assert answer.startswith(sample.after)
    assert evaluate(base, record.settings["data"], result.adapter, teach_eos=False).loss < losses[0]


def test_tensorboard_is_fed(done):
    reader = EventAccumulator(str(done[0].folder / "tensorboard"))
    reader.Reload()
    metrics = [json.loads(line) for line in (done[0].folder / METRICS).read_text().splitlines()]
    for kind, tag in (("step", "train/loss"), ("eval", "eval/loss")):
        expected = [(line["step"], pytest.approx(line["loss"])) for line in metrics if line["kind"] == kind]
        assert [(event.step, event.value) for event in reader.Scalars(tag)] == expected


def test_the_base_is_the_very_same(base, done):
    assert bits(base.model) == done[1]
    assert clean(base.model)


class MidwayError(Exception):
    """Something in the middle of a run."""


def break_at_step_two(event):
    if isinstance(event, Stepped) and event.progress.step == 2:
        raise MidwayError


@pytest.mark.parametrize(
    ("options", "listener", "error"),
    [
        ({"lr": 1e30}, None, Diverged),
        ({}, break_at_step_two, MidwayError),
        ({"log": "wandbb"}, None, ConfigError),
    ],
)
def test_after_an_error_the_base_is_clean(base, files, tmp_path, options, listener, error):
    before, state = bits(base.model), torch.get_rng_state()
    with pytest.raises(error):
        train(base, listener, data=files["texts"], output=str(tmp_path / "run"), **SMALL | options)
    assert bits(base.model) == before
    assert clean(base.model)
    assert torch.equal(torch.get_rng_state(), state)


@pytest.mark.parametrize("kind", ["texts", "chats"])
@pytest.mark.parametrize("holdout", [0, 3])
def test_kinds_of_rows(base, files, tmp_path, kind, holdout):
    options = SMALL | {"holdout": holdout, "samples": 1, "engine": "padded"}
    result = train(base, data=files[kind], output=str(tmp_path / "run"), **options)
    record = result.record
    assert record.way == "padded (--engine padded)"
    assert result.adapter.origin.prompt["chat"] == (kind == "chats")
    assert (record.before is None) == (record.after is None) == (holdout == 0)
    assert len(record.samples) == (1 if holdout and kind == "chats" else 0)
    metrics = [json.loads(line) for line in (tmp_path / "run" / METRICS).read_text().splitlines()]
    assert [line["kind"] for line in metrics].count("eval") == (2 if holdout else 0)
    assert result.progress.best_step == (3 if holdout else -1)
    assert "steps" in result.adapter.origin.training


def test_a_file_of_validation_rows(base, files, tmp_path):
    other = write_rows(tmp_path / "other.jsonl", QUESTIONS[:5])
    result = train(
        base,
        data=files["questions"],
        validation=other,
        output=str(tmp_path / "run"),
        **SMALL | {"max_steps": 1},
    )
    assert result.record.before.loss == pytest.approx(evaluate(base, other).loss, rel=1e-5)
    assert result.record.data["rows"] == 27


def test_a_folder_of_a_base(tmp_path, files, monkeypatch):
    """By position or by name; the stored options lead back to it."""
    monkeypatch.setenv("ONEBASE_HOME", str(tmp_path / "home"))
    folder = str(save_base(tmp_path / "base"))
    one = train(folder, data=files["texts"], output=str(tmp_path / "one"), dtype="float32", **SMALL)
    two = train(base=folder, data=files["texts"], output=str(tmp_path / "two"), dtype="float32", **SMALL)
    assert one.adapter.tensors().keys() == two.adapter.tensors().keys()
    assert all(torch.equal(tensor, two.adapter.tensors()[n]) for n, tensor in one.adapter.tensors().items())
    assert yaml.safe_load((tmp_path / "one" / OPTIONS).read_text())["base"] == folder
    again = train(output=str(tmp_path / "one"), resume=True).adapter.tensors()
    assert all(torch.equal(tensor, again[name]) for name, tensor in one.adapter.tensors().items())


# -- What is refused.

BAD = {
    "no data": ({"data": ""}, ConfigError, "option data"),
    "no output": ({"output": ""}, ConfigError, "option output"),
    "an unknown option": ({"lrr": 1}, ConfigError, "unknown option lrr(.|\n)*lr"),
    "no such file": ({"data": "./nothing.jsonl"}, MissingFile, "nothing.jsonl"),
    "no such target": ({"target_modules": "qproj"}, TargetError, "q_proj"),
    "a gate": ({"teach_eos": False, "holdout": 0}, GateError, "no-eos"),
    "too long": ({"max_length": 4}, DataError, "longer than 4"),
    "too much held out": ({"holdout": 27}, DataError, "leaves none"),
}


@pytest.mark.parametrize("case", BAD)
def test_nothing_is_written_before_all_is_right(base, files, tmp_path, case):
    options, error, text = BAD[case]
    output = tmp_path / "run"
    with pytest.raises(error, match=text):
        train(base, **{"data": files["questions"], "output": str(output), **SMALL, **options})
    assert list(tmp_path.iterdir()) == []
    assert clean(base.model)


@pytest.fixture
def stopped(base, files, tmp_path):
    """A run that was interrupted after its first step; and its options."""
    options = SMALL | {"data": files["questions"], "output": str(tmp_path / "run")}
    train(base, stop=lambda: True, **options)
    return options


def test_the_usual_rate_is_written_down_and_resumed(base, files, tmp_path):
    options = {name: value for name, value in SMALL.items() if name != "lr"}
    options |= {"data": files["questions"], "output": str(tmp_path / "run")}
    plans = []
    train(base, listener=plans.append, stop=lambda: True, **options)
    assert yaml.safe_load((tmp_path / "run" / OPTIONS).read_text())["lr"] == plans[0].lr == 1e-3
    result = train(base, output=options["output"], resume=True, lr=0)
    assert (result.reason, result.record.settings["lr"]) == ("completed", 1e-3)


# What differs -> (options, a part of the message)
CHANGED = {
    "an option": ({"lr": 0.5}, r"resume: lr was 0\.01, is 0\.5"),
    "two options": ({"seed": 1, "rank": 4}, "rank was 2, is 4; seed was 0, is 1"),
    "the steps": ({"max_steps": 9}, "max_steps was 3, is 9"),
    "the batches": ({"engine": "padded"}, "engine was 'auto', is 'padded'"),
}


@pytest.mark.parametrize("case", CHANGED)
def test_a_resumed_run_must_be_the_same(base, stopped, case):
    options, text = CHANGED[case]
    with pytest.raises(ConfigError, match=text) as error:
        train(base, output=stopped["output"], resume=True, **options)
    assert "restore these" in str(error.value)


def test_a_resumed_run_must_have_the_same_data_and_base(base, stopped, tmp_path):
    other = write_rows(tmp_path / "other.jsonl", [QUESTIONS[0] | {"completion": "No."}, *QUESTIONS[1:]])
    with pytest.raises(ConfigError, match="resume: data digest was"):
        train(base, output=stopped["output"], resume=True, data=other)
    with pytest.raises(ConfigError, match="resume: base fingerprint was"):
        train(text_base(seed=1), output=stopped["output"], resume=True)


def test_what_may_differ_when_resumed(base, stopped, files, tmp_path):
    """The run may have been moved, the rows too; and what is shown or kept is no part of the result."""
    moved = tmp_path / "moved"
    (tmp_path / "run").rename(moved)
    copied = write_rows(tmp_path / "copied.jsonl", QUESTIONS)
    result = train(base, output=str(moved), resume=True, data=copied, keep=1, samples=1)
    assert (result.reason, result.progress.step, result.folder) == ("completed", 3, moved)
    assert not (tmp_path / "run").exists()


def test_two_processes_do_not_train_in_one_folder(base, stopped):
    folder = Path(stopped["output"])
    before = (folder / METRICS).read_bytes()
    with process_lock(folder / LOCK), pytest.raises(OutputExists, match="another process is at work there"):
        train(base, output=str(folder), resume=True)
    assert (folder / METRICS).read_bytes() == before
    assert train(base, output=str(folder), resume=True).reason == "completed"


def test_nothing_to_resume(base, files, tmp_path):
    with pytest.raises(MissingFile, match=rf"no {OPTIONS} there, so no run to resume"):
        train(base, output=str(tmp_path), resume=True)
    for broken in ("lr: [", "just text", "7"):
        (tmp_path / OPTIONS).write_text(broken)
        with pytest.raises(FormatError, match=rf"its {OPTIONS} is broken"):
            read_config({"output": str(tmp_path), "resume": True})
    (tmp_path / OPTIONS).write_text("{}")
    with pytest.raises(ConfigError, match="resume and overwrite"):
        train(base, output=str(tmp_path), resume=True, overwrite=True, data=files["texts"])


def test_a_run_is_never_overwritten_in_silence(base, stopped):
    with pytest.raises(OutputExists, match=r"already holds a run(.|\n)*--resume(.|\n)*--overwrite"):
        train(base, **stopped)
    with pytest.raises(DataError):
        train(base, **stopped | {"overwrite": True, "max_length": 4})
    again = train(base, output=stopped["output"], resume=True)  # the refused attempts have harmed nothing
    note = again.folder / "my notes.txt"
    note.write_text("mine")
    fresh = train(base, **stopped | {"overwrite": True, "rank": 4})
    assert (fresh.adapter.config.rank, fresh.progress.step) == (4, 3)
    assert note.read_text() == "mine"  # only what a run wrote is deleted
    assert not read_config({"output": stopped["output"], "resume": True}).overwrite


def test_a_foreign_folder_is_left_alone(base, files, tmp_path):
    (tmp_path / "thesis.tex").write_text("years of work")
    for overwrite in (False, True):
        with pytest.raises(OutputExists, match="not empty and holds no run"):
            train(base, data=files["texts"], output=str(tmp_path), overwrite=overwrite, **SMALL)
    assert [path.name for path in tmp_path.iterdir()] == ["thesis.tex"]
    with pytest.raises(OutputExists, match="it is a file"):
        train(base, data=files["texts"], output=str(tmp_path / "thesis.tex"), overwrite=True, **SMALL)
    assert (tmp_path / "thesis.tex").read_text() == "years of work"


def test_an_output_that_cannot_be_written(base, files, tmp_path):
    (tmp_path / "file").write_text("mine")
    with pytest.raises(OutputError, match="is not a folder"):
        train(base, data=files["texts"], output=str(tmp_path / "file" / "run"), **SMALL)
    assert [path.name for path in tmp_path.iterdir()] == ["file"]
    assert clean(base.model)


@pytest.mark.skipif(os.geteuid() == 0, reason="root may write everywhere")
def test_a_read_only_folder(base, files, tmp_path):
    (tmp_path / "locked").mkdir(mode=0o555)
    with pytest.raises(OutputError, match="cannot write"):
        train(base, data=files["texts"], output=str(tmp_path / "locked" / "run"), **SMALL)
    assert list((tmp_path / "locked").iterdir()) == []
