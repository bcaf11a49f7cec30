"""Checkpoints: bit for bit there and back, old ones deleted, and none lost when a write fails."""

import errno
import os

import pytest
import torch
from torch import nn

from adapters import trained
from onebase.config import LoraConfig, OptimConfig
from onebase.errors import FormatError, OnebaseError, OutputError
from onebase.storage.format import read_adapter
from onebase.training import checkpoint
from onebase.training.checkpoint import Progress, Snapshot, checkpoints, folder_of, load, save
from onebase.training.optim import make_optimizer, optimizer_tensors
from tiny import tiny

FACTS = {
    "rank": 4,
    "lr": 0.1,
    "target_modules": ["q_proj"],
    "alpha_pattern": {"q_proj": 0.1 + 0.2},
    "system": "ü",
}


@pytest.fixture(scope="module")
def adapter():
    return trained(tiny("llama"), LoraConfig(rank=4, alpha=8, target_modules=["q_proj", "v_proj"]))


def snapshot(adapter, step=3, **progress):
    """A snapshot after one step of AdamW; `step` also marks its random state."""
    parameters = {name: nn.Parameter(tensor.clone()) for name, tensor in adapter.tensors().items()}
    optimizer = make_optimizer(parameters, OptimConfig(lr=1e-3))
    torch.manual_seed(step)
    for parameter in parameters.values():
        parameter.grad = torch.randn_like(parameter)
    optimizer.step()
    tensors = optimizer_tensors(optimizer, parameters) | checkpoint.random_tensors()
    return Snapshot(adapter, Progress(step, 10 * step, 1.5, **progress), tensors, FACTS)


def same(one, two):
    assert one.adapter == two.adapter
    assert one.progress == two.progress
    assert one.facts == two.facts
    assert one.tensors.keys() == two.tensors.keys()
    for name, tensor in one.tensors.items():
        assert tensor.dtype == two.tensors[name].dtype
        assert torch.equal(tensor, two.tensors[name]), name


def names(run):
    return sorted(path.name for path in (run / checkpoint.FOLDER).iterdir())


def test_there_and_back_bit_for_bit(tmp_path, adapter):
    written = snapshot(adapter, best_step=2, best_loss=0.1 + 0.2, worse=1)
    folder = save(tmp_path, written, keep=2)
    assert folder == folder_of(tmp_path, 3)
    same(load(folder), written)
    assert read_adapter(folder) == adapter  # any reader of adapters can use it
    assert names(tmp_path) == ["step-00000003"]


def test_nothing_evaluated_yet_comes_back_too(tmp_path, adapter):
    written = snapshot(adapter)
    assert written.progress.best_loss == float("inf")
    same(load(save(tmp_path, written, keep=1)), written)


def test_random_numbers_go_on(tmp_path, adapter):
    folder = save(tmp_path, snapshot(adapter), keep=1)
    checkpoint.restore_random(load(folder).tensors)
    first = torch.rand(5)
    torch.rand(77)
    checkpoint.restore_random(load(folder).tensors)
    assert torch.equal(torch.rand(5), first)


@pytest.mark.parametrize(
    ("keep", "best", "left"),
    [
        (1, -1, [9]),
        (2, -1, [8, 9]),
        (2, 6, [6, 8, 9]),
        (2, 8, [8, 9]),
        (1, 5, [5, 9]),
        (9, 5, [5, 6, 7, 8, 9]),
    ],
)
def test_old_ones_go_but_never_the_best(tmp_path, adapter, keep, best, left):
    for step in range(5, 10):
        save(tmp_path, snapshot(adapter, step, best_step=best if best <= step else -1), keep)
    assert names(tmp_path) == [f"step-{step:08d}" for step in left]
    assert [load(folder).progress.step for folder in checkpoints(tmp_path)] == left


def test_the_order_is_by_number(tmp_path, adapter):
    for step in (9, 10, 100):
        save(tmp_path, snapshot(adapter, step), keep=2)
    assert [load(folder).progress.step for folder in checkpoints(tmp_path)] == [10, 100]


def test_a_step_saved_again_replaces_itself(tmp_path, adapter):
    save(tmp_path, snapshot(adapter, 3), keep=2)
    written = snapshot(adapter, 3, worse=4)
    save(tmp_path, written, keep=2)
    assert names(tmp_path) == ["step-00000003"]
    same(load(folder_of(tmp_path, 3)), written)


def disk_full(*_, **__):
    raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))


@pytest.mark.parametrize(
    "target", ["os.fsync", "onebase.training.checkpoint.write_shards", "onebase.storage.format._serialised"]
)
def test_a_full_disk_leaves_the_earlier_ones(tmp_path, adapter, monkeypatch, target):
    first = snapshot(adapter, 1, best_step=1, best_loss=2.0)
    save(tmp_path, first, keep=1)
    with monkeypatch.context() as patch:
        patch.setattr(target, disk_full)
        with pytest.raises(OutputError, match="No space left on device"):
            save(tmp_path, snapshot(adapter, 2), keep=1)
    assert names(tmp_path) == ["step-00000001"]
    same(load(folder_of(tmp_path, 1)), first)


@pytest.mark.parametrize(
    "content",
    [
        "",
        "{",
        "[]",
        "null",
        "{}",
        '{"progress": {"step": 1}}',
        '{"progress": {"stp": 1}, "facts": {}}',
        '{"progress": [], "facts": {}}',
    ],
)
def test_a_broken_state_is_a_format_error(tmp_path, adapter, content):
    folder = save(tmp_path, snapshot(adapter), keep=1)
    (folder / checkpoint.STATE).write_text(content)
    with pytest.raises(FormatError, match=r"checkpoint .*step-00000003: its state\.json is broken"):
        load(folder)


def test_a_state_that_is_no_text_or_not_there(tmp_path, adapter):
    folder = save(tmp_path, snapshot(adapter), keep=1)
    (folder / checkpoint.STATE).write_bytes(b"\xff\xfe")
    with pytest.raises(FormatError, match=r"state\.json is broken"):
        load(folder)
    (folder / checkpoint.STATE).unlink()
    with pytest.raises(FormatError, match=r"state\.json is broken"):
        load(folder)


@pytest.mark.parametrize("name", ["state/model.safetensors", "adapter_model.safetensors"])
def test_cut_off_tensors_are_an_error(tmp_path, adapter, name):
    folder = save(tmp_path, snapshot(adapter), keep=1)
    (folder / name).write_bytes((folder / name).read_bytes()[:-7])
    with pytest.raises(OnebaseError):
        load(folder)


def test_progress_remembers_the_best():
    progress = Progress(step=4)
    for loss, expected in [
        (2.0, (4, 2.0, 0)),
        (3.0, (4, 2.0, 1)),
        (float("nan"), (4, 2.0, 2)),
        (1.0, (4, 1.0, 0)),
    ]:
        progress = progress.after_eval(loss)
        assert (progress.best_step, progress.best_loss, progress.worse) == expected


def test_equal_is_no_improvement():
    assert Progress(step=5, best_step=4, best_loss=2.0).after_eval(2.0).worse == 1
