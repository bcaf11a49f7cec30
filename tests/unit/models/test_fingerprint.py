"""Fingerprints: what changes them, what must not, and when the remembered one is used."""

from __future__ import annotations

import hashlib
import json
import os
import time
from pathlib import Path

import pytest
import torch
from torch import nn

from onebase.adapters.injection import inject, new_adapter
from onebase.config import LoraConfig
from onebase.models.fingerprint import (
    fingerprint_files,
    fingerprint_model,
    fingerprint_tensors,
    remembered,
    tensor_digests,
)
from onebase.storage.shards import SINGLE, write_shards


@pytest.fixture(autouse=True)
def home(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("ONEBASE_HOME", str(tmp_path / "home"))
    return tmp_path / "home"


def tensors() -> dict[str, torch.Tensor]:
    generator = torch.Generator().manual_seed(0)
    return {
        "a": torch.randn(4, 3, generator=generator),
        "b": torch.randn(7, generator=generator).bfloat16(),
        "count": torch.tensor(3),
    }


def settle(folder: Path) -> None:
    """Make the files look an hour old, so that their digest is remembered."""
    for path in folder.iterdir():
        os.utime(path, (time.time() - 3600,) * 2)


def test_the_documented_formula():
    a = torch.tensor([[1.0, 2.0]])
    line = f"w F32 [1,2] {hashlib.sha256(a.numpy().tobytes()).hexdigest()}\n"
    assert fingerprint_tensors([("w", a)]) == "sha256:" + hashlib.sha256(line.encode()).hexdigest()


def test_single_sharded_and_in_memory_agree(tmp_path: Path):
    found = set()
    for limit in (10**9, 60, 1):
        folder = tmp_path / str(limit)
        folder.mkdir()
        write_shards(folder, tensors().items(), limit)
        found.add(fingerprint_files(folder))
    backwards = list(tensors().items())[::-1]
    assert found == {fingerprint_tensors(backwards)}


@pytest.mark.parametrize("position", [-1, -30])
def test_one_flipped_bit_changes_it(tmp_path: Path, position: int):
    file = write_shards(tmp_path, tensors().items())[0]
    before = fingerprint_files(tmp_path)
    data = bytearray(file.read_bytes())
    data[position] ^= 1
    file.write_bytes(data)
    assert fingerprint_files(tmp_path) != before


@pytest.mark.parametrize(
    "change",
    [
        lambda t: {"renamed": t["a"], "b": t["b"], "count": t["count"]},
        lambda t: t | {"a": t["a"].reshape(3, 4)},
        lambda t: t | {"a": t["a"].view(torch.int32)},
        lambda t: t | {"b": -t["b"]},
        lambda t: {"a": t["a"], "b": t["b"]},
        lambda t: t | {"count": torch.tensor([3])},
    ],
    ids=["name", "shape", "dtype", "sign", "missing", "scalar"],
)
def test_name_shape_dtype_and_bytes_all_count(change):
    assert fingerprint_tensors(change(tensors()).items()) != fingerprint_tensors(tensors().items())


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16, torch.int64, torch.bool])
def test_layout_in_memory_does_not_count(dtype: torch.dtype):
    whole = (torch.arange(24) % 5).to(dtype).reshape(4, 6)
    assert fingerprint_tensors([("t", whole.T)]) == fingerprint_tensors([("t", whole.T.contiguous())])
    assert fingerprint_tensors([("t", whole[:, ::2])]) == fingerprint_tensors([("t", whole[:, ::2].clone())])
    assert fingerprint_tensors([("t", whole.T)]) != fingerprint_tensors([("t", whole)])


def test_digests_name_the_tensor_that_differs():
    other = tensors()
    other["b"][2] += 1
    old, new = tensor_digests(tensors().items()), tensor_digests(other.items())
    assert [name for name in old if old[name] != new[name]] == ["b"]
    assert old["b"].startswith("BF16 [7] ")


class Tied(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Embedding(5, 3)
        self.head = nn.Linear(3, 5, bias=False)
        self.head.weight = self.embed.weight
        self.register_buffer("kept", torch.ones(2))
        self.register_buffer("derived", torch.ones(2), persistent=False)


def test_a_model_counts_ties_once_and_persistent_buffers_only():
    model = Tied()
    named = [("embed.weight", model.embed.weight), ("kept", model.kept)]
    assert fingerprint_model(model) == fingerprint_tensors(named)
    model.derived += 1
    assert fingerprint_model(model) == fingerprint_tensors(named)
    model.kept += 1
    assert fingerprint_model(model) != fingerprint_tensors([named[0], ("kept", torch.ones(2))])


def test_an_injected_model_is_digested_under_the_base_names():
    model = nn.Sequential(nn.Linear(3, 3), nn.Linear(3, 2))
    before = fingerprint_model(model)
    config = LoraConfig(rank=1, target_modules="0", modules_to_save="1")
    inject(model, new_adapter(model, config))
    assert fingerprint_model(model) == before
    model[1].base.weight.data[0, 0] += 1
    assert fingerprint_model(model) != before


def only_entry(home: Path) -> Path:
    (entry,) = (home / "digests").iterdir()
    return entry


def test_an_unchanged_file_is_not_read_again(tmp_path: Path, home: Path):
    folder = tmp_path / "base"
    folder.mkdir()
    write_shards(folder, tensors().items())
    settle(folder)
    true = fingerprint_files(folder)
    entry = json.loads(only_entry(home).read_text())
    only_entry(home).write_text(json.dumps(entry | {"digest": "from the cache"}))
    assert fingerprint_files(folder) == "from the cache"

    os.utime(folder / SINGLE, (time.time() - 1800,) * 2)
    assert fingerprint_files(folder) == true
    assert json.loads(only_entry(home).read_text())["digest"] == true


@pytest.mark.parametrize("damage", [b"", b"{", b"[]", b'{"identity": []}', b"\xff"])
def test_a_broken_entry_is_computed_anew(tmp_path: Path, home: Path, damage: bytes):
    folder = tmp_path / "base"
    folder.mkdir()
    write_shards(folder, tensors().items())
    settle(folder)
    true = fingerprint_files(folder)
    only_entry(home).write_bytes(damage)
    assert fingerprint_files(folder) == true
    assert json.loads(only_entry(home).read_text())["digest"] == true


def test_a_file_just_written_is_not_remembered(tmp_path: Path, home: Path):
    """It may change again within one tick of the file system's clock."""
    file = tmp_path / "file"
    file.write_text("x")
    future = time.time() + 60
    os.utime(file, (future, future))
    assert [remembered("kind", [file], lambda text=text: text) for text in "ab"] == ["a", "b"]
    assert not (home / "digests").exists()


def test_two_kinds_of_digest_of_one_file_do_not_mix(tmp_path: Path):
    (tmp_path / "file").write_text("x")
    settle(tmp_path)
    assert [remembered(kind, [tmp_path / "file"], lambda kind=kind: kind) for kind in "aba"] == [
        "a",
        "b",
        "a",
    ]


def test_a_home_that_cannot_be_written_costs_only_time(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    (tmp_path / "file").write_text("x")
    settle(tmp_path)
    monkeypatch.setenv("ONEBASE_HOME", str(tmp_path / "file"))
    assert remembered("kind", [tmp_path / "file"], lambda: "digest") == "digest"
