"""Real processes, really killed: what `onebase train --resume` makes is what an unbroken run would have made."""

import json
import signal
import sys
from pathlib import Path

import pytest
import torch

from onebase.storage.format import read_adapter
from onebase.training import checkpoint
from runs import environment, finished, launch, metrics, wait_for
from texts import QUESTIONS, save_base, write_rows

pytestmark = pytest.mark.slow

COMMAND = [sys.executable, "-c", "from onebase.cli.main import main; raise SystemExit(main())", "train"]
FLAGS = [
    *(
        "--dtype",
        "float32",
        "--rank",
        "4",
        "--dropout",
        "0.2",
        "--lr",
        "0.01",
        "--holdout",
        "4",
        "--samples",
        "0",
    ),
    *("--batch-size", "4", "--accumulate", "2", "--max-steps", "120", "--epochs", "100"),
    *("--save-every", "2", "--eval-every", "40"),
]


@pytest.fixture(scope="module")
def world(tmp_path_factory):
    """A base and rows on disk, and the environment in which commands run."""
    folder = tmp_path_factory.mktemp("world")
    save_base(folder / "base")
    write_rows(folder / "rows.jsonl", QUESTIONS)
    return folder, environment(folder)


def start(world, output, *flags):
    return launch([*COMMAND, "--output", str(output), *flags], world[0])


def first_time(world, output, *flags):
    return start(world, output, "--base", "base", "--data", "rows.jsonl", *FLAGS, *flags)


@pytest.fixture(scope="module")
def whole(world):
    output = world[0] / "whole"
    code, _, err = finished(first_time(world, output))
    assert code == 0, err
    return output


def stored(run: Path):
    """The adapter file: its header, whose entries safetensors writes in any order, and the tensors' bytes."""
    content = (run / "adapter_model.safetensors").read_bytes()
    end = 8 + int.from_bytes(content[:8], "little")
    return json.loads(content[8:end]), content[end:]


def assert_equal(run: Path, expected: Path):
    assert metrics(run) == metrics(expected)
    assert stored(run) == stored(expected)
    last, wanted = (checkpoint.load(checkpoint.checkpoints(path)[-1]) for path in (run, expected))
    assert last.tensors.keys() == wanted.tensors.keys()
    assert all(torch.equal(tensor, wanted.tensors[name]) for name, tensor in last.tensors.items())
    assert not list(run.rglob(".*.tmp"))


def resume_to_the_end(world, run, expected):
    code, _, err = finished(start(world, run, "--resume"))
    assert code == 0, err
    assert_equal(run, expected)


def test_killed_at_once_and_again(world, whole):
    """Without a word, at whatever it is doing: SIGKILL, twice in one run."""
    run = world[0] / "killed"
    for lines, process in ((7, first_time), (50, None)):
        running = process(world, run) if process else start(world, run, "--resume")
        wait_for(running, run, lines)
        running.kill()
        assert finished(running)[0] == -signal.SIGKILL
        assert not (run / "run.json").exists()
        for folder in checkpoint.checkpoints(run):  # whatever is there is whole
            checkpoint.load(folder)
    resume_to_the_end(world, run, whole)


def test_ctrl_c_finishes_the_step_and_saves(world, whole):
    run = world[0] / "stopped"
    running = first_time(world, run)
    wait_for(running, run, 20)
    running.send_signal(signal.SIGINT)
    code, _, err = finished(running)
    assert code == 130
    last = checkpoint.checkpoints(run)[-1]
    assert checkpoint.load(last).progress.step == metrics(run)[-1]["step"]
    assert f"interrupted at step {metrics(run)[-1]['step']}, saved" in err
    assert "--resume" in err
    assert "Traceback" not in err
    assert read_adapter(last).origin.base == "base"
    resume_to_the_end(world, run, whole)


def test_a_term_signal_is_as_ctrl_c(world):
    run = world[0] / "terminated"
    running = first_time(world, run)
    wait_for(running, run, 11)
    running.send_signal(signal.SIGTERM)
    assert finished(running)[0] == 130
    assert checkpoint.load(checkpoint.checkpoints(run)[-1]).progress.step == metrics(run)[-1]["step"]


def test_a_loss_that_is_not_finite_ends_with_code_3(world):
    run = world[0] / "diverged"
    code, _, err = finished(first_time(world, run, "--lr", "1e30"))
    assert code == 3, err
    assert "onebase: step 2: loss nan" in err
    assert "rows [" in err
    assert "Traceback" not in err
    assert not (run / "adapter_model.safetensors").exists()


def test_another_option_is_refused(world, whole):
    code, _, err = finished(start(world, whole, "--resume", "--lr", "0.5"))
    assert code == 2
    assert "lr was 0.01, is 0.5" in err
