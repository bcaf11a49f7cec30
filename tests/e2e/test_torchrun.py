"""`torchrun -m onebase train`: real processes that make the run of one, stop together, and go on again."""

import json
import os
import signal
import sys
from functools import partial
from pathlib import Path

import pytest
import torch

import runs
from onebase.storage.format import read_adapter
from onebase.training import checkpoint
from runs import launch, metrics
from texts import QUESTIONS, save_base, write_rows

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(not Path("/proc/self/environ").exists(), reason="finds the processes under /proc"),
]

FLAGS = (
    "--base base --data rows.jsonl --dtype float32 --rank 4 --lr 0.01 --holdout 4 --samples 1 --batch-size 4 "
    "--accumulate 2 --epochs 100 --save-every 2 --eval-every 4 --eps 1e-3"  # AdamW then widens no rounding
).split()
PATIENCE = 180  # seconds: torchrun starts its processes one by one, and each imports everything
finished = partial(runs.finished, patience=PATIENCE)
wait_for = partial(runs.wait_for, patience=PATIENCE)


@pytest.fixture(scope="module")
def world(tmp_path_factory):
    """A folder with a base and rows in which commands run."""
    folder = tmp_path_factory.mktemp("world")
    save_base(folder / "base")
    write_rows(folder / "rows.jsonl", QUESTIONS)
    return folder


def start(world, count, output, *flags):
    torchrun = (
        ["-m", "torch.distributed.run", "--standalone", f"--nproc-per-node={count}"] if count > 1 else []
    )
    return launch([sys.executable, *torchrun, "-m", "onebase", "train", "--output", output, *flags], world)


def whole(world, count, output, *flags):
    code, out, err = finished(start(world, count, output, *flags))
    assert code == 0, err[-3000:]
    return world / output, out


def tensors(run: Path):
    return read_adapter(run).tensors()


def assert_near(run: Path, expected: Path):
    """The same run but for rounding: losses to 1e-6 in float32, gradient norms to 1e-5, tensors to 5e-6."""
    for one, other in zip(metrics(run), metrics(expected), strict=True):
        assert one.keys() == other.keys()
        for name, value in one.items():
            assert value == (pytest.approx(other[name], rel=1e-5) if "norm" in name else near(other[name]))
    mine, theirs = tensors(run), tensors(expected)
    assert mine.keys() == theirs.keys()
    for name, tensor in mine.items():
        assert (tensor - theirs[name]).norm() <= 5e-6 * theirs[name].norm(), name


def near(value):
    return pytest.approx(value, rel=1e-6) if isinstance(value, float) else value


def worker(launcher, rank):
    """The id of the process that torchrun gave this rank."""
    children = Path(f"/proc/{launcher.pid}/task/{launcher.pid}/children")
    for child in children.read_text().split():
        environment = Path(f"/proc/{child}/environ").read_bytes().split(b"\0")
        if f"RANK={rank}".encode() in environment:
            return int(child)
    raise AssertionError(f"no process of rank {rank}")


@pytest.fixture(scope="module")
def alone(world):
    return whole(world, 1, "alone", *FLAGS, "--max-steps", "8")[0]


def test_two_processes_make_the_run_of_one(world, alone):
    run, out = whole(world, 2, "two", *FLAGS, "--max-steps", "8")
    assert out.count("held-out loss 6.") == 1  # the first alone prints
    assert out.count("adapter: two") == 1
    assert_near(run, alone)
    one, other = (json.loads((folder / "run.json").read_text()) for folder in (run, alone))
    assert one["after"]["loss"] == pytest.approx(other["after"]["loss"], rel=1e-6)
    assert len(one["samples"]) == 1
    assert one["proof"]["after"] == other["proof"]["after"]
    assert {path.name for path in run.iterdir()} == {path.name for path in alone.iterdir()}


def test_a_sharded_base_makes_the_same_run(world, alone):
    run, out = whole(world, 2, "sharded", *FLAGS, "--max-steps", "8", "--shard-base")
    assert "packed (the base is sharded)" in out
    assert_near(run, alone)
    assert json.loads((run / "run.json").read_text())["proof"]["tensors"] == 21


def test_one_signal_stops_all_and_a_resumed_run_is_the_unbroken_one(world):
    """With dropout, whose masks no checkpoint holds; the signal goes to the second process alone."""
    flags = [*FLAGS, "--max-steps", "60", "--dropout", "0.2", "--samples", "0"]
    unbroken, _ = whole(world, 2, "unbroken", *flags)
    running = start(world, 2, "stopped", *flags)
    wait_for(running, world / "stopped", 6)
    os.kill(worker(running, 1), signal.SIGTERM)
    code, _, err = finished(running)
    run = world / "stopped"
    last = checkpoint.load(checkpoint.checkpoints(run)[-1])
    assert code != 0
    assert f"interrupted at step {last.progress.step}, saved" in err
    assert 0 < last.progress.step < 60
    assert metrics(run)[-1]["step"] == last.progress.step
    whole(world, 2, "stopped", "--resume")
    assert metrics(run) == metrics(unbroken)
    mine, theirs = tensors(run), tensors(unbroken)
    assert all(torch.equal(tensor, theirs[name]) for name, tensor in mine.items())


def test_a_killed_process_ends_the_others_and_one_process_can_go_on(world):
    flags = [*FLAGS, "--max-steps", "60", "--samples", "0"]
    running = start(world, 2, "killed", *flags)
    wait_for(running, world / "killed", 8)
    os.kill(worker(running, 1), signal.SIGKILL)
    code, _, _ = finished(running)
    assert code != 0
    run = world / "killed"
    assert not (run / "run.json").exists()
    whole(world, 1, "killed", "--resume")
    expected, _ = whole(world, 1, "expected", *flags)
    for one, other in zip(metrics(run), metrics(expected), strict=True):
        for name in {*one} - {
            "loss",
            "grad_norm",
        }:  # step, learning rate, tokens: the place in data and schedule
            assert one[name] == other[name]
        # Rounding grows as training goes on.
        assert one["loss"] == pytest.approx(other["loss"], rel=1e-4 if one["step"] <= 20 else 1e-2)


@pytest.mark.parametrize(
    ("flags", "told"),
    [
        (["--shard-base"], "option shard_base: there is one process"),
        (["--shard-base", "--engine", "engine"], "option shard_base: there is one process"),
        (["--shard-base", "--engine", "engine", "--plan"], "the engine reads weights where they are"),
    ],
)
def test_what_cannot_be_sharded(world, flags, told):
    code, _, err = finished(start(world, 1, "refused", *FLAGS, *flags))
    assert code == 2
    assert told in err
    assert "Traceback" not in err
    assert not (world / "refused").exists()
