"""Adapters alike: the second is read as `load_adapter` reads it, and what is wrong with it is found all the same."""

import json
import shutil
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from adapters import trained
from decoders import decoder
from onebase.config import LoraConfig
from onebase.errors import BaseMismatch, FormatError, OnebaseError
from onebase.models.base import wrap_base
from onebase.storage import alike
from onebase.storage.alike import AdapterReader
from onebase.storage.format import CONFIG, SIDECAR, TENSORS, load_adapter, save_adapter

OPTIONS = {
    "lora": {},
    "rslora": {"rslora": True},
    "some": {"target_modules": ["q_proj", "v_proj"]},
    "patterns": {"rank_pattern": {"down_proj": 3}, "alpha_pattern": {"down_proj": 5.0}},
    "dora": {"dora": True},
    "bias": {"lora_bias": True, "target_modules": ["q_proj"]},
    "head": {"modules_to_save": ["lm_head"]},
}


@pytest.fixture(scope="module")
def base():
    return wrap_base(decoder("llama"))


def three(base, folder, **options):
    """The folders of three adapters of one kind."""
    for number in range(3):
        config = LoraConfig(**{"rank": 4, "alpha": 8, **options})
        save_adapter(trained(base.model, config, seed=number), folder / f"a{number}")
    return [folder / f"a{number}" for number in range(3)]


@pytest.fixture
def full_readings(monkeypatch):
    """The folders that were read in full."""
    found = []

    def noted(folder, base, **known):
        if isinstance(folder, Path):  # not an outline's files
            found.append(folder.name)
        return load_adapter(folder, base, **known)

    monkeypatch.setattr(alike, "load_adapter", noted)
    return found


@pytest.mark.parametrize("name", OPTIONS)
def test_each_is_what_a_full_reading_gives(name, base, tmp_path, full_readings):
    reader, folders = AdapterReader(base), three(base, tmp_path, **OPTIONS[name])
    for folder in (*folders, folders[0]):
        made = reader.read(folder)
        assert made == load_adapter(folder, base)
        for tensor in made.tensors().values():
            assert tensor.dtype == torch.float32
    assert full_readings == ([] if name != "head" else ["a0", "a1", "a2", "a0"])


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_narrow_files_are_widened(dtype, base, tmp_path, full_readings):
    folders = three(base, tmp_path)
    for folder in folders:
        shutil.copy(folder / TENSORS, tmp_path / "wide")
        tensors = {name: tensor.to(dtype) for name, tensor in load_file(tmp_path / "wide").items()}
        save_file(tensors, folder / TENSORS, {"format": "pt"})
        (folder / SIDECAR).unlink()
    reader = AdapterReader(base)
    for folder in folders:
        assert reader.read(folder) == load_adapter(folder, base)
    assert full_readings == []


def test_a_kind_is_proved_once_and_by_the_first_one_that_is_whole(base, tmp_path, monkeypatch):
    """What is wrong with the first adapter of a kind is found, and does not speak for those that come after it."""
    proved = []
    outlined = alike.read_files
    monkeypatch.setattr(alike, "read_files", lambda *given: proved.append(given[0].name) or outlined(*given))
    reader, folders = AdapterReader(base), three(base, tmp_path)
    good = (folders[0] / TENSORS).read_bytes()
    broken_tensors(folders[0], 400, NAN)
    with pytest.raises(FormatError, match="NaN or infinity"):
        reader.read(folders[0])
    (folders[0] / TENSORS).write_bytes(good[:-4])
    with pytest.raises(FormatError, match="broken or cut short"):
        reader.read(folders[0])
    for folder in folders[1:]:
        assert reader.read(folder) == load_adapter(folder, base)
    save_adapter(foreign(base), folders[0], overwrite=True)
    with pytest.raises(BaseMismatch):
        AdapterReader(base).read(folders[0])
    assert proved == ["a0", "a0"]


def test_an_update_of_a_module_that_the_config_does_not_target_is_refused_whoever_comes_first(base, tmp_path):
    folder = three(base, tmp_path)[0]
    raw = json.loads((folder / CONFIG).read_text())
    (folder / CONFIG).write_text(json.dumps(raw | {"target_modules": ["q_proj"]}))
    with pytest.raises(BaseMismatch, match="unexpected"):
        AdapterReader(base).read(folder)


def test_what_is_read_stays_when_the_file_changes(base, tmp_path):
    reader, folders = AdapterReader(base), three(base, tmp_path)
    made = [reader.read(folder) for folder in folders[:2]]
    wanted = [load_adapter(folder, base).tensors() for folder in folders[:2]]
    wanted = [{name: tensor.clone() for name, tensor in tensors.items()} for tensors in wanted]
    for folder in folders[:2]:
        size = (folder / TENSORS).stat().st_size
        with (folder / TENSORS).open("r+b") as file:
            file.write(b"\0" * size)
    for one, tensors in zip(made, wanted, strict=True):
        assert all(torch.equal(tensor, tensors[name]) for name, tensor in one.tensors().items())


def broken_tensors(folder, at, value):
    """The same file with four other bytes at a place, counted from its end."""
    data = bytearray((folder / TENSORS).read_bytes())
    data[len(data) - at : len(data) - at + 4] = value
    (folder / TENSORS).write_bytes(data)


NAN, INFINITY = b"\x00\x00\xc0\x7f", b"\x00\x00\x80\xff"


@pytest.mark.parametrize("value", [NAN, INFINITY])
@pytest.mark.parametrize("at", [4, 400])
def test_numbers_that_are_none_are_found(value, at, base, tmp_path):
    reader, folders = AdapterReader(base), three(base, tmp_path)
    reader.read(folders[0])
    broken_tensors(folders[1], at, value)
    with pytest.raises(FormatError, match="NaN or infinity"):
        reader.read(folders[1])


@pytest.mark.parametrize(
    "change", ["cut", "longer", "gone", "another rank", "another base", "config", "sidecar"]
)
def test_whatever_else_is_wrong_is_found(change, base, tmp_path):
    reader, folders = AdapterReader(base), three(base, tmp_path)
    reader.read(folders[0])
    folder, tensors = folders[1], folders[1] / TENSORS
    if change == "cut":
        tensors.write_bytes(tensors.read_bytes()[:-4])
    elif change == "longer":
        tensors.write_bytes(tensors.read_bytes() + b"1234")
    elif change == "gone":
        tensors.unlink()
    elif change == "another rank":
        (folder / CONFIG).write_text((folder / CONFIG).read_text().replace('"r": 4', '"r": 5'))
    elif change == "another base":
        save_adapter(foreign(base), folder, overwrite=True)
    elif change == "config":
        (folder / CONFIG).write_text("{")
    else:
        (folder / SIDECAR).write_text(json.dumps({"base": {"fingerprint": "sha256:other"}}))
    with pytest.raises(OnebaseError) as ours:
        reader.read(folder)
    with pytest.raises(type(ours.value)):
        load_adapter(folder, base)
    if change == "another base":
        assert isinstance(ours.value, BaseMismatch)


def foreign(base):
    """An adapter of the same kind for a base with another fingerprint."""
    made = trained(base.model, LoraConfig(rank=4, alpha=8), seed=9)
    return type(made)(made.config, made.lowrank, origin=type(made.origin)(fingerprint="sha256:" + "0" * 64))


def test_where_each_came_from_is_its_own(base, tmp_path):
    reader, folders = AdapterReader(base), three(base, tmp_path)
    for number, folder in enumerate(folders):
        sidecar = json.loads((folder / SIDECAR).read_text())
        (folder / SIDECAR).write_text(json.dumps(sidecar | {"training": {"steps": number}}))
        assert reader.read(folder).origin.training == {"steps": number}


def changed_header(folder, change):
    """The same file with another header."""
    data = (folder / TENSORS).read_bytes()
    end = 8 + int.from_bytes(data[:8], "little")
    text = json.dumps(change(json.loads(data[8:end]))).encode()
    (folder / TENSORS).write_bytes(len(text).to_bytes(8, "little") + text + data[end:])


def first_with(**fields):
    """The header with other facts of its first tensor; None leaves one out."""

    def change(header):
        name = next(name for name in header if name != "__metadata__")
        entry = {key: value for key, value in (header[name] | fields).items() if value is not None}
        return header | {name: entry}

    return change


@pytest.mark.parametrize(
    "change",
    [
        lambda header: [*header],
        lambda header: header | {"more": []},
        lambda header: header | {"more": "text"},
        first_with(shape=None),
        first_with(shape="8"),
        first_with(shape=[4.0, 32]),
        first_with(shape=[-1, 32]),
        first_with(shape=[2**62, 2**62]),
        first_with(shape=[32, 4]),
        first_with(shape=[4, 32, 1]),
        first_with(dtype=None),
        first_with(dtype="F17"),
        first_with(dtype="I32"),
        first_with(data_offsets=None),
        first_with(data_offsets=5),
        first_with(data_offsets=[0, 1]),
        first_with(data_offsets=["0", "512"]),
    ],
)
def test_a_header_that_is_none_gives_the_error_of_a_full_reading(change, base, tmp_path):
    folder = three(base, tmp_path)[0]
    changed_header(folder, change)
    with pytest.raises(OnebaseError) as full:
        load_adapter(folder, base)
    with pytest.raises(type(full.value)) as ours:
        AdapterReader(base).read(folder)
    assert str(ours.value) == str(full.value)


def test_tensors_need_not_stand_in_the_order_of_the_header(base, tmp_path):
    folder = three(base, tmp_path)[0]
    wanted = load_adapter(folder, base).tensors()
    wanted = {name: tensor.clone() for name, tensor in wanted.items()}
    changed_header(folder, lambda header: dict(reversed(header.items())))
    made = AdapterReader(base).read(folder).tensors()
    assert made.keys() == wanted.keys()
    assert all(torch.equal(made[name], tensor) for name, tensor in wanted.items())
