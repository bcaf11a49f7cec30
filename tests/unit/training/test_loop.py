"""The loop: its events, early stopping, divergence; and law 8: interrupted and resumed equals never interrupted."""

import json
import shutil
from dataclasses import replace

import pytest
import torch

from onebase.errors import Diverged
from onebase.storage.format import read_adapter
from onebase.training import checkpoint
from onebase.training.loop import Evaluated, Finished, Saved, Stepped
from onebase.training.run import METRICS, train
from texts import QUESTIONS, text_base, write_rows

# 27 rows: 23 to train on, so 6 steps of 2 x 2 rows in an epoch (the last one short) and 9 in all.
OPTIONS = {
    "rank": 4,
    "alpha": 8,
    "dropout": 0.2,
    "lr": 1e-2,
    "lora_plus": 4,
    "batch_size": 2,
    "accumulate": 2,
    "epochs": 1.5,
    "holdout": 4,
    "eval_every": 4,
    "save_every": 3,
    "samples": 0,
    "seed": 5,
}
STEPS = 9


@pytest.fixture(scope="module")
def base():
    return text_base()


@pytest.fixture(scope="module")
def rows(tmp_path_factory):
    return write_rows(tmp_path_factory.mktemp("rows") / "rows.jsonl", QUESTIONS)


class Watch:
    """A listener that keeps events, and asks to stop once `steps` steps were done."""

    def __init__(self, steps=10**9):
        self.events, self.steps = [], steps

    def __call__(self, event):
        self.events.append(event)

    def stop(self):
        return sum(isinstance(event, Stepped) for event in self.events) >= self.steps

    def shape(self):
        """Events in short: `4` a step, `e4` an evaluation after it, `s4` a checkpoint, else the reason."""
        marks = {Stepped: "", Evaluated: "e", Saved: "s"}
        return [
            event.reason if isinstance(event, Finished) else f"{marks[type(event)]}{event.progress.step}"
            for event in self.events[1:]  # the first is the plan
        ]


def run(base, rows, folder, steps=10**9, **options):
    watch = Watch(steps)
    result = train(base, watch, watch.stop, data=rows, output=str(folder), **{**OPTIONS, **options})
    return result, watch


def resume(base, folder, steps=10**9, **options):
    watch = Watch(steps)
    torch.manual_seed(99)  # what the caller did before is of no matter
    return train(base, watch, watch.stop, output=str(folder), resume=True, **options), watch


@pytest.fixture(scope="module")
def whole(base, rows, tmp_path_factory):
    """The run that was never interrupted."""
    folder = tmp_path_factory.mktemp("whole") / "run"
    result, watch = run(base, rows, folder)
    return result, watch, folder


def lines(folder):
    """metrics.jsonl without what the clock decides."""
    clock = ("seconds", "tokens_per_second")
    found = [json.loads(line) for line in (folder / METRICS).read_text().splitlines()]
    return [{name: value for name, value in line.items() if name not in clock} for line in found]


def assert_equal_runs(folder, expected):
    one, two = read_adapter(folder).tensors(), read_adapter(expected).tensors()
    assert one.keys() == two.keys()
    assert all(torch.equal(tensor, two[name]) for name, tensor in one.items())
    assert lines(folder) == lines(expected)
    mine, theirs = (checkpoint.load(checkpoint.checkpoints(path)[-1]) for path in (folder, expected))
    assert mine.adapter == theirs.adapter
    assert replace(mine.progress, seconds=0.0) == replace(theirs.progress, seconds=0.0)
    assert mine.tensors.keys() == theirs.tensors.keys()
    assert all(torch.equal(tensor, theirs.tensors[name]) for name, tensor in mine.tensors.items())


def test_events_come_in_order(whole):
    result, watch, folder = whole
    shape = watch.shape()
    best = {f"s{event.progress.step}" for event in watch.events if isinstance(event, Saved)}
    evaluations = [event for event in watch.events if isinstance(event, Evaluated)]
    assert [name for name in shape if not name.startswith("s")] == [
        "e0", "1", "2", "3", "4", "e4", "5", "6", "7", "8", "e8", "9", "e9", "completed",
    ]  # fmt: skip
    assert {"s3", "s6", "s9"} <= best
    for event in evaluations:
        improved = event.progress.best_step == event.progress.step > 0
        assert not improved or f"s{event.progress.step}" in best
    assert shape.index("s3") == shape.index("3") + 1
    assert result.progress.step == result.record.timing.steps == STEPS
    assert [path.name for path in checkpoint.checkpoints(folder)][-1] == "step-00000009"
    assert evaluations[-1].metrics["loss"] < evaluations[0].metrics["loss"] - 0.3  # it does learn


def test_metrics_say_what_happened(whole, base, rows):
    found = lines(whole[2])
    steps = [line for line in found if line["kind"] == "step"]
    assert [line["step"] for line in steps] == list(range(1, STEPS + 1))
    assert [line["epoch"] for line in steps][5] == 1.0
    assert steps[0]["lr"] == OPTIONS["lr"]  # 3 % of 9 steps is no step of warm-up
    assert steps[-1]["lr"] == pytest.approx(OPTIONS["lr"] / STEPS)
    first_epoch, plan = steps[5], whole[1].events[0]
    assert first_epoch["tokens_seen"] == plan.tokens
    assert sum(line["tokens"] for line in steps[:6]) == plan.loss_tokens
    assert plan.steps == STEPS


def test_the_same_run_twice_is_the_same(base, rows, whole, tmp_path):
    run(base, rows, tmp_path / "again")
    assert_equal_runs(tmp_path / "again", whole[2])


@pytest.mark.parametrize("at", [1, 3, 4, 8])
def test_interrupted_and_resumed_equals_never_interrupted(base, rows, whole, tmp_path, at):
    result, watch = run(base, rows, tmp_path / "run", steps=at)
    assert (result.reason, result.progress.step) == ("interrupted", at)
    assert result.adapter is result.record is None
    assert watch.shape()[-2:] == [f"s{at}", "interrupted"]
    assert not (tmp_path / "run" / "adapter_model.safetensors").exists()
    again, _ = resume(base, tmp_path / "run")
    assert again.reason == "completed"
    assert_equal_runs(tmp_path / "run", whole[2])


def test_interrupted_many_times(base, rows, whole, tmp_path):
    run(base, rows, tmp_path / "run", steps=2)
    for steps in (1, 3, 1):
        assert resume(base, tmp_path / "run", steps)[0].reason == "interrupted"
    assert resume(base, tmp_path / "run")[1].shape()[0] == "8"
    assert_equal_runs(tmp_path / "run", whole[2])


class PulledPlugError(Exception):
    """Ends a run in the middle, as a kill would."""


@pytest.mark.parametrize("at", [2, 5])
def test_killed_between_checkpoints(base, rows, whole, tmp_path, at):
    """At 2 before the first checkpoint, at 5 two steps after one: metrics beyond it are written anew."""
    watch = Watch(at)

    def listener(event):
        watch(event)
        if watch.stop():
            raise PulledPlugError

    with pytest.raises(PulledPlugError):
        train(base, listener, data=rows, output=str(tmp_path / "run"), **OPTIONS)
    assert lines(tmp_path / "run")[-1]["step"] == at
    with (tmp_path / "run" / METRICS).open("a") as file:
        file.write('{"kind": "st')
    _, watch = resume(base, tmp_path / "run")
    assert watch.shape()[0] == ("e0" if at == 2 else "5")
    assert_equal_runs(tmp_path / "run", whole[2])


def test_a_stop_at_the_last_step_is_a_finished_run(base, rows, whole, tmp_path):
    assert run(base, rows, tmp_path / "run", steps=STEPS)[0].reason == "completed"
    assert_equal_runs(tmp_path / "run", whole[2])


def test_a_finished_run_resumed_is_finished_again(base, whole, tmp_path):
    shutil.copytree(whole[2], tmp_path / "run")
    again, watch = resume(base, tmp_path / "run")
    assert watch.shape() == ["completed"]
    assert again.record.timing.steps == STEPS
    assert_equal_runs(tmp_path / "run", whole[2])


# A learning rate that is far too large after its warm-up: the held-out loss falls, then it only rises.
WORSENING = {"lr": 0.6, "warmup": 40, "schedule": "constant", "max_steps": 40, "epochs": 100, "eval_every": 2}


@pytest.fixture(scope="module")
def worsened(base, rows, tmp_path_factory):
    folder = tmp_path_factory.mktemp("worsened") / "run"
    return *run(base, rows, folder, **WORSENING, patience=3, save_every=1, keep=1), folder


def test_patience_ends_the_run_and_the_best_is_kept(worsened):
    result, watch, folder = worsened
    losses = [event.metrics["loss"] for event in watch.events if isinstance(event, Evaluated)]
    best = losses.index(min(losses))
    assert result.reason == "early"
    assert 0 < result.progress.best_step == 2 * best < result.progress.step == 2 * (best + 3) < 40
    assert len(losses) == best + 4
    assert f"the adapter is that of step {2 * best}" in result.record.finished
    kept = checkpoint.folder_of(folder, 2 * best)
    assert [path.name for path in checkpoint.checkpoints(folder)] == [
        kept.name,
        checkpoint.folder_of(folder, result.progress.step).name,
    ]
    found, expected = read_adapter(folder).tensors(), read_adapter(kept).tensors()
    assert all(torch.equal(found[name], tensor) for name, tensor in expected.items())
    assert result.record.after.loss == pytest.approx(min(losses), rel=1e-6)
    assert result.adapter.origin.training["steps"] == 2 * best


def test_a_run_that_had_given_up_is_not_taken_up_again(base, worsened, tmp_path):
    """Killed after its last checkpoint, while the reports were made: nothing is left to train."""
    shutil.copytree(worsened[2], tmp_path / "run")
    (tmp_path / "run" / "run.json").unlink()
    again, watch = resume(base, tmp_path / "run")
    assert watch.shape() == ["early"]
    assert_equal_runs(tmp_path / "run", worsened[2])
    assert again.record.finished == worsened[0].record.finished


def test_no_better_than_the_base(base, rows, tmp_path):
    options = {"lr": 30.0, "modules_to_save": "lm_head", "max_steps": 2, "eval_every": 1}
    result, _ = run(base, rows, tmp_path / "run", **options)
    assert result.progress.best_step == 0
    assert "no evaluation was better than the plain base" in result.record.finished
    assert result.adapter.origin.training["steps"] == 2


def test_divergence_names_step_rows_and_checkpoint(base, rows, tmp_path):
    with pytest.raises(Diverged) as error:
        run(base, rows, tmp_path / "run", lr=1e30, save_every=1, eval_every=100)
    text = str(error.value)
    assert text.startswith("step 2: loss nan") or text.startswith("step 2: loss inf")
    assert f"the last good checkpoint is {checkpoint.folder_of(tmp_path / 'run', 1)}" in text
    assert "lower --lr" in text
    named = json.loads(text[text.index("rows [") + 5 : text.index("]") + 1])
    assert len(named) == 4
    assert set(named) <= set(range(1, 28))
    assert checkpoint.load(checkpoint.folder_of(tmp_path / "run", 1)).progress.step == 1


def test_divergence_before_any_checkpoint(base, rows, tmp_path):
    with pytest.raises(Diverged, match="no checkpoint was written before it"):
        run(base, rows, tmp_path / "run", lr=1e30)
    assert len(lines(tmp_path / "run")) == 2  # the base's evaluation and the first step
