"""A sweep's runs are those that `train` makes alone: losses, adapters, folders; and what happens when one fails."""

import json

import pytest
import torch

from onebase.adapters.injection import adapter_names
from onebase.adapters.layers import LoraLayer
from onebase.errors import ConfigError, Diverged, OutputExists
from onebase.files import process_lock
from onebase.storage.format import read_adapter
from onebase.training import sweep as module
from onebase.training.loop import Finished, Stepped
from onebase.training.run import LOCK, METRICS, train
from onebase.training.sweep import RESULTS, SweepPlan, foresee_sweep, sweep
from texts import QUESTIONS, text_base, write_rows

pytestmark = pytest.mark.slow

# 27 rows: 23 to train on, so 6 steps of 2 x 2 rows in an epoch (the last one short) and 8 in all.
OPTIONS = {
    "alpha": 8,
    "lr": 1e-2,
    "batch_size": 2,
    "accumulate": 2,
    "max_steps": 8,
    "holdout": 4,
    "eval_every": 4,
    "samples": 1,
}
GRID = {"rank": "2,5", "target_modules": "all-linear;q_proj,down_proj", "dropout": "0.2", "seed": "3"}


@pytest.fixture(scope="module")
def base():
    return text_base()


@pytest.fixture(scope="module")
def rows(tmp_path_factory):
    return write_rows(tmp_path_factory.mktemp("rows") / "rows.jsonl", QUESTIONS)


@pytest.fixture(scope="module")
def done(base, rows, tmp_path_factory):
    """A sweep of four, three of them at once; its results by name, and what was heard."""
    folder, heard = tmp_path_factory.mktemp("sweep") / "sweep", []
    results = sweep(base, heard.append, together=3, data=rows, output=str(folder), **OPTIONS, **GRID)
    return {one.name: one for one in results}, heard, folder


def lines(folder):
    return [json.loads(line) for line in (folder / METRICS).read_text().splitlines()]


LOOSE = {"seconds": float("inf"), "tokens_per_second": float("inf"), "grad_norm": 1e-5}


def assert_close_runs(folder, expected):
    """Equal but for the last bits that a product over more rows rounds otherwise."""
    mine, theirs = lines(folder), lines(expected)
    assert len(mine) == len(theirs)
    for one, other in zip(mine, theirs, strict=True):
        assert one.keys() == other.keys()
        assert one.pop("kind") == other.pop("kind")
        for name, value in one.items():
            assert value == pytest.approx(other[name], rel=LOOSE.get(name, 1e-6)), name
    one, two = read_adapter(folder), read_adapter(expected)
    assert one.config == two.config
    assert one.tensors().keys() == two.tensors().keys()
    for name, tensor in one.tensors().items():
        torch.testing.assert_close(tensor, two.tensors()[name], rtol=1e-3, atol=2e-6)


def clean(model):
    return (
        not adapter_names(model)
        and not any(isinstance(module, LoraLayer) for module in model.modules())
        and not any(p.requires_grad or p.grad is not None for p in model.parameters())
    )


@pytest.mark.parametrize(("rank", "targets"), [(2, "all-linear"), (5, "q_proj,down_proj")])
def test_each_run_is_the_one_that_train_makes(base, rows, done, tmp_path, rank, targets):
    results, _, folder = done
    name = f"rank-{rank}_target_modules-{targets.replace(',', '-')}"
    own = {"rank": rank, "target_modules": targets, "dropout": 0.2, "seed": 3}
    alone = train(base, data=rows, output=str(tmp_path / "alone"), **OPTIONS, **own)
    assert_close_runs(folder / name, tmp_path / "alone")
    assert {p.name for p in (folder / name).iterdir()} == {p.name for p in (tmp_path / "alone").iterdir()}
    record, expected = results[name].run.record, alone.record
    assert results[name].loss == pytest.approx(expected.after.loss, rel=1e-6)
    assert record.proof.equal
    assert record.way == expected.way == "engine"
    assert record.settings == {**expected.settings, "output": str(folder / name)}
    assert record.samples[0].before == expected.samples[0].before
    assert (record.timing.steps, record.timing.tokens) == (expected.timing.steps, expected.timing.tokens)


def test_the_results_are_sorted_and_written(done):
    results, _, folder = done
    losses = [one.loss for one in results.values()]
    assert losses == sorted(losses)
    assert len(set(losses)) == 4
    stored = json.loads((folder / RESULTS).read_text())
    assert [row["name"] for row in stored] == list(results)
    assert [row["loss"] for row in stored] == losses
    assert {(row["ended"], row["step"], row["error"]) for row in stored} == {("completed", 8, None)}
    assert stored[0]["rank"] in ("2", "5")


def test_the_runs_go_in_step_and_their_times_add_up(done):
    results, heard, _ = done
    plan, *events = heard
    assert isinstance(plan, SweepPlan)
    assert [len(group) for group in plan.groups] == [3, 1]
    steps = [(one.name, one.event.progress.step) for one in events if isinstance(one.event, Stepped)]
    assert steps == [(name, step) for group in plan.groups for step in range(1, 9) for name in group]
    assert [one.event.reason for one in events if isinstance(one.event, Finished)] == ["completed"] * 4
    for one in results.values():
        assert one.run.progress.seconds == pytest.approx(
            sum(line["seconds"] for line in lines(one.folder) if line["kind"] == "step"), abs=1e-3
        )
    shares = plan.memory - next(iter(plan.plans.values())).memory
    assert shares > 0
    assert next(iter(results.values())).run.record.memory.predicted_bytes <= plan.memory


def test_the_base_is_as_it_was(base, done):
    assert clean(base.model)


def test_seeds_have_their_own_rows_and_a_run_of_many_may_end_before_the_others(base, rows, tmp_path):
    """The split depends on the seed. Early stopping ends one run; the other goes on, with its own numbers."""
    options = OPTIONS | {"rank": 3, "samples": 0, "patience": 1, "eval_every": 1}
    del options["lr"]
    results = sweep(base, data=rows, output=str(tmp_path / "sweep"), seed=[0, 7], lr=[1e-2, 3.0], **options)
    ended = {(one.run.reason, one.run.progress.step == 8) for one in results}
    assert ended == {("early", False), ("completed", True)}
    for one in (one for one in results if one.varied["lr"] < 1):  # else rounding grows from step to step
        train(base, data=rows, output=str(tmp_path / one.name), **options | one.varied)
        assert_close_runs(one.folder, tmp_path / one.name)


def test_a_run_that_diverges_is_left_out_and_the_others_go_on(base, rows, tmp_path):
    options = OPTIONS | {"samples": 0, "rank": 2, "clip": 0}
    grid = {"lr": "1e-2,1e30"}
    results = sweep(base, data=rows, output=str(tmp_path / "sweep"), **options | grid)
    good, bad = results
    assert bad.name == "lr-1e30"
    assert bad.run is None
    assert isinstance(bad.error, Diverged)
    assert "step 2" in str(bad.error)
    train(base, data=rows, output=str(tmp_path / "alone"), **options | {"lr": 1e-2})
    assert_close_runs(good.folder, tmp_path / "alone")
    stored = json.loads((tmp_path / "sweep" / RESULTS).read_text())
    assert [row["ended"] for row in stored] == ["completed", "failed"]
    assert "loss" in stored[1]["error"]
    assert clean(base.model)


def test_an_interrupted_sweep_goes_on_by_itself_or_run_by_run(base, rows, done, tmp_path):
    """Resumed together or alone, each run ends as the one that was never stopped."""
    heard, folder = [], tmp_path / "sweep"
    options = dict(data=rows, output=str(folder), **OPTIONS, **GRID)

    def stop():
        return sum(isinstance(getattr(one, "event", None), Stepped) for one in heard) >= 6

    first = sweep(base, heard.append, stop, together=2, **options)
    assert sum(one.run is None for one in first) == 2  # the second group was not started
    assert [(one.run.reason, one.run.progress.step) for one in first if one.run] in (
        [("interrupted", 3), ("interrupted", 4)],
        [("interrupted", 4), ("interrupted", 3)],
    )
    assert clean(base.model)
    one = next(one for one in first if one.run)
    train(base, output=str(one.folder), resume=True)
    results = sweep(base, together=4, resume=True, **options)
    assert {one.run.reason for one in results} == {"completed"}
    whole, _, _ = done
    for one in results:
        assert_close_runs(one.folder, whole[one.name].folder)


def test_what_the_engine_does_not_take_runs_in_turn(base, rows, tmp_path):
    heard = []
    options = OPTIONS | {"samples": 0, "rank": 2, "max_steps": 2, "dora": [False, True], "seed": [1, 2]}
    results = sweep(base, heard.append, data=rows, output=str(tmp_path / "sweep"), **options)
    assert [len(group) for group in heard[0].groups] == [2, 1, 1]
    ways = {name: plan.way for name, plan in heard[0].plans.items()}
    assert ways["dora-off_seed-1"] == "engine"
    assert ways["dora-on_seed-2"].startswith("packed (the engine cannot compute this model")
    assert all(one.run.reason == "completed" for one in results)
    alone = train(base, data=rows, output=str(tmp_path / "alone"), **options | {"dora": True, "seed": 2})
    (one,) = (one for one in results if one.name == "dora-on_seed-2")
    assert read_adapter(one.folder).tensors().keys() == alone.adapter.tensors().keys()
    assert all(
        torch.equal(tensor, alone.adapter.tensors()[name])
        for name, tensor in read_adapter(one.folder).tensors().items()
    )


def test_memory_decides_how_many_train_at_once(base, rows, tmp_path, monkeypatch):
    options = {"data": rows, "output": str(tmp_path / "sweep"), **OPTIONS, "rank": "2,3,4"}
    monkeypatch.setattr(module, "base_for", lambda config, snapshot: base)
    plan = foresee_sweep(options)
    assert plan.groups == (("rank-2", "rank-3", "rank-4"),)
    own = plan.plans["rank-2"].memory - module.shared_memory(base)
    assert plan.memory > module.shared_memory(base) + 3 * own
    monkeypatch.setattr(module, "available_memory", lambda: int(2.5 * own))
    assert foresee_sweep(options).groups == (("rank-2", "rank-3"), ("rank-4",))
    monkeypatch.setattr(module, "available_memory", lambda: 0)
    assert foresee_sweep(options).groups == (("rank-2",), ("rank-3",), ("rank-4",))
    assert foresee_sweep(options, 2).groups == (("rank-2", "rank-3"), ("rank-4",))
    assert not (tmp_path / "sweep").exists()


def test_a_start_that_looks_at_the_base_sees_no_other_run(base, rows, tmp_path):
    """PiSSA's and EVA's starts are made on the plain base, though the runs then share it."""
    options = OPTIONS | {"samples": 0, "rank": 2, "max_steps": 2, "target_modules": "q_proj"}
    results = sweep(base, data=rows, output=str(tmp_path / "sweep"), init="pissa,eva", **options)
    for one in results:
        train(base, data=rows, output=str(tmp_path / one.name), init=one.varied["init"], **options)
        assert_close_runs(one.folder, tmp_path / one.name)


REFUSED = {
    "no output": ({"output": ""}, ConfigError, "name a folder for the runs"),
    "no grid": ({"rank": "2"}, ConfigError, "no option has several values"),
    "negative": ({"together": -1}, ConfigError, "must be 0 or more"),
    "sharded": ({"shard_base": True}, ConfigError, "runs in one process"),
    "a wrong target": ({"target_modules": "q_prj"}, LookupError, "q_proj"),
}


@pytest.mark.parametrize("case", REFUSED)
def test_mistakes_are_found_before_anything_is_written(base, rows, tmp_path, case):
    changes, kind, told = REFUSED[case]
    options = {"data": rows, "output": str(tmp_path / "sweep"), "rank": "2,3", **OPTIONS, **changes}
    with pytest.raises(kind, match=told):
        sweep(base, **options)
    assert not (tmp_path / "sweep").exists()


def test_folders_that_hold_something_are_left_alone(base, rows, tmp_path):
    options = {"data": rows, "output": str(tmp_path / "sweep"), "rank": "2,3", **OPTIONS}
    (tmp_path / "sweep" / "rank-3").mkdir(parents=True)
    (tmp_path / "sweep" / "rank-3" / "notes.txt").write_text("mine")
    with pytest.raises(OutputExists, match="holds no run"):
        sweep(base, **options)
    assert not (tmp_path / "sweep" / "rank-2").exists()
    (tmp_path / "sweep" / "rank-3" / "notes.txt").unlink()
    with (
        process_lock(tmp_path / "sweep" / "rank-3" / LOCK),
        pytest.raises(OutputExists, match="another process"),
    ):
        sweep(base, **options)
    assert clean(base.model)
