"""Loggers: TensorBoard for real; names and missing packages; how a tracker is driven."""

import sys
from types import SimpleNamespace

import pytest
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from onebase.errors import ConfigError
from onebase.training.loggers import LOGGERS, open_loggers

STEP = {"kind": "step", "step": 1, "loss": 2.5, "lr": 0.125}


def scalars(folder):
    reader = EventAccumulator(str(folder / "tensorboard"))
    reader.Reload()
    tags = reader.Tags()
    found = {tag: [(e.step, e.value) for e in reader.Scalars(tag)] for tag in tags["scalars"]}
    return found, [reader.Tensors(tag)[0].tensor_proto.string_val[0].decode() for tag in tags["tensors"]]


def test_tensorboard_holds_what_was_logged(tmp_path):
    with open_loggers(["tensorboard"], tmp_path, {"lr": 0.125, "schedule": "linear"}) as loggers:
        loggers.log(STEP, 1)
        loggers.log({"kind": "eval", "step": 1, "loss": 1.75, "note": "text", "flag": True, "none": None}, 1)
        loggers.log(STEP | {"step": 2, "loss": 1.5}, 2)
    found, texts = scalars(tmp_path)
    assert found == {
        "train/loss": [(1, 2.5), (2, 1.5)],
        "train/lr": [(1, 0.125), (2, 0.125)],
        "eval/loss": [(1, 1.75)],
    }
    assert len(texts) == 1
    assert "lr: 0.125" in texts[0]
    assert "schedule: linear" in texts[0]


def test_a_resumed_run_holds_no_step_twice(tmp_path):
    with open_loggers(["tensorboard"], tmp_path, {}) as loggers:
        for step in (1, 2, 3):
            loggers.log({"loss": float(step)}, step)
    with open_loggers(["tensorboard"], tmp_path, {}, first_step=3) as loggers:
        loggers.log({"loss": 30.0}, 3)
    assert scalars(tmp_path)[0] == {"loss": [(1, 1.0), (2, 2.0), (3, 30.0)]}


def test_no_logger_is_fine(tmp_path):
    loggers = open_loggers([], tmp_path, {})
    loggers.log(STEP, 1)
    loggers.close()
    assert list(tmp_path.iterdir()) == []


def test_an_unknown_name_gives_the_nearest(tmp_path):
    with pytest.raises(ConfigError, match=r"log=wandbb: no logger(.|\n)*nearest valid: wandb"):
        open_loggers(["tensorboard", "wandbb"], tmp_path, {})
    assert list(tmp_path.iterdir()) == []  # nothing was opened


@pytest.mark.parametrize("name", LOGGERS)
def test_a_missing_package_gives_the_command(tmp_path, monkeypatch, name):
    monkeypatch.setitem(sys.modules, LOGGERS[name][0], None)  # as if it were not installed
    with pytest.raises(ConfigError, match=rf"log={name}(.|\n)*pip install 'onebase\[{name}\]'"):
        open_loggers([name], tmp_path, {})


def recording_tracker(calls, name="wandb"):
    """A module with the calls that wandb and trackio share, which keeps what it was told."""

    def init(**options):
        calls.append(("init", options))
        return SimpleNamespace(
            log=lambda metrics, step: calls.append(("log", metrics, step)),
            finish=lambda: calls.append(("finish",)),
        )

    return SimpleNamespace(__name__=name, init=init)


def test_a_tracker_is_started_fed_and_finished(tmp_path, monkeypatch):
    calls = []
    monkeypatch.setitem(sys.modules, "wandb", recording_tracker(calls))
    monkeypatch.setenv("WANDB_PROJECT", "mine")
    with open_loggers(["wandb", "wandb"], tmp_path / "first-run", {"lr": 0.125}) as loggers:
        loggers.log(STEP, 1)
        loggers.close()  # closing twice is fine
    assert calls == [
        ("init", {"project": "mine", "name": "first-run", "config": {"lr": 0.125}}),
        ("log", {"train/loss": 2.5, "train/lr": 0.125}, 1),
        ("finish",),
    ]


def test_loggers_opened_before_a_failure_are_closed(tmp_path, monkeypatch):
    calls = []

    def broken_init(**_):
        raise RuntimeError("no account")

    monkeypatch.setitem(sys.modules, "wandb", recording_tracker(calls))
    monkeypatch.setitem(sys.modules, "trackio", SimpleNamespace(__name__="trackio", init=broken_init))
    with pytest.raises(RuntimeError, match="no account"):
        open_loggers(["wandb", "trackio"], tmp_path, {})
    assert [call[0] for call in calls] == ["init", "finish"]
