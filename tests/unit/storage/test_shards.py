"""Reading and writing safetensors by hand: agreement with the library, and every kind of damage."""

from __future__ import annotations

import json
import struct
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import load, load_file, save, save_file

from onebase.errors import FormatError, MissingFile, OutputError
from onebase.storage.shards import (
    DTYPES,
    INDEX,
    SINGLE,
    list_tensors,
    read_tensor,
    tensor_bytes,
    write_shards,
)

DRAWN = ["F64", "F32", "F16", "BF16", "I64", "I8", "U8", "BOOL"]
SHAPES = st.lists(st.integers(0, 4), max_size=3)


def make(seed: int, shape: list[int], dtype: str) -> torch.Tensor:
    values = torch.randn(shape, generator=torch.Generator().manual_seed(seed)) * 5
    return values.to(DTYPES[dtype])


def tiny() -> dict[str, torch.Tensor]:
    return {
        "b.weight": make(0, [3, 4], "F32"),
        "a.weight": make(1, [2, 2], "BF16"),
        "c.bias": make(2, [5], "F16"),
        "d.count": torch.tensor(7),
    }


def write_raw(path: Path, header: object, data: bytes = b"") -> None:
    text = header if isinstance(header, bytes) else json.dumps(header).encode()
    path.write_bytes(struct.pack("<Q", len(text)) + text + data)


def entry(begin: int, end: int, **changes: object) -> dict[str, object]:
    return {"dtype": "U8", "shape": [end - begin], "data_offsets": [begin, end]} | changes


@settings(max_examples=40)
@given(st.lists(st.tuples(SHAPES, st.sampled_from(DRAWN)), min_size=1, max_size=5))
def test_reads_what_the_library_wrote(tmp_path_factory, drawn: list[tuple[list[int], str]]):
    file = tmp_path_factory.mktemp("raw") / SINGLE
    tensors = {f"t{n}": make(n, shape, dtype) for n, (shape, dtype) in enumerate(drawn)}
    file.write_bytes(save(tensors, metadata={"format": "pt"}))
    infos = list_tensors(file)
    assert [info.name for info in infos] == sorted(tensors)
    for info in infos:
        wanted = tensors[info.name]
        assert (info.shape, DTYPES[info.dtype]) == (tuple(wanted.shape), wanted.dtype)
        assert len(tensor_bytes(info)) == wanted.nbytes == info.end - info.start
        assert torch.equal(read_tensor(info), wanted)


@settings(max_examples=25)
@given(st.integers(1, 200))
def test_shards_hold_the_limit_and_give_everything_back(tmp_path_factory, limit: int):
    folder = tmp_path_factory.mktemp("shards")
    files = write_shards(folder, tiny().items(), limit, {"made": "here"})
    infos = list_tensors(folder)
    assert {info.file for info in infos} == set(files) == set(folder.glob("*.safetensors"))
    for file in files:
        inside = [info for info in infos if info.file == file]
        assert len(inside) == 1 or sum(info.end - info.start for info in inside) <= limit
    for info in infos:
        assert torch.equal(read_tensor(info), tiny()[info.name])
    assert (folder / INDEX).exists() == (len(files) > 1)
    if len(files) > 1:
        index = json.loads((folder / INDEX).read_text())
        assert index["metadata"]["total_size"] == sum(tensor.nbytes for tensor in tiny().values())
        assert files[0].name == f"model-00001-of-{len(files):05d}.safetensors"


def test_one_large_shard_is_the_plain_file_that_the_library_reads(tmp_path: Path):
    files = write_shards(tmp_path, tiny().items())
    assert files == [tmp_path / SINGLE]
    assert [path.name for path in tmp_path.iterdir()] == [SINGLE]
    loaded = load_file(files[0])
    assert all(torch.equal(loaded[name], tensor) for name, tensor in tiny().items())
    assert load(files[0].read_bytes()).keys() == tiny().keys()


def test_the_writer_streams(tmp_path: Path):
    """Each tensor is made only when the shard before it is on disk."""
    on_disk: list[int] = []

    def stream():
        for n in range(4):
            on_disk.append(len(list(tmp_path.iterdir())))
            yield f"t{n}", torch.ones(10)

    write_shards(tmp_path, stream(), max_shard_bytes=40)
    assert on_disk == [0, 0, 1, 2]


def test_views_are_written_as_what_they_show(tmp_path: Path):
    whole = torch.arange(12.0).reshape(3, 4)
    write_shards(tmp_path, [("t", whole.T), ("row", whole[1])])
    row, transposed = list_tensors(tmp_path)
    assert torch.equal(read_tensor(transposed), whole.T)
    assert torch.equal(read_tensor(row), whole[1])
    assert transposed.shape == (4, 3)


@pytest.mark.parametrize(("tensors", "text"), [([], "no tensors"), ([("a", torch.ones(1))] * 2, "twice.*a")])
def test_writer_refuses_nothing_and_duplicates(tmp_path: Path, tensors: list, text: str):
    with pytest.raises(FormatError, match=text):
        write_shards(tmp_path, tensors)


def test_writer_reports_a_folder_that_is_not_there(tmp_path: Path):
    with pytest.raises(OutputError, match="cannot write"):
        write_shards(tmp_path / "none", tiny().items())


DAMAGE = {
    "header is no JSON": (b"{", b"", "1 problem"),
    "header is a list": ([1], b"", "no JSON object"),
    "no offsets": ({"a": {"dtype": "U8", "shape": [1]}}, b"x", "a: entry lacks"),
    "unknown dtype": ({"a": entry(0, 1, dtype="Q4")}, b"x", "a: dtype Q4"),
    "negative extent": ({"a": entry(0, 1, shape=[-1])}, b"x", "a: shape"),
    "shape and bytes differ": ({"a": entry(0, 4, shape=[3])}, b"xxxx", "a: offsets 0 to 4 do not hold the 3"),
    "offset before the data": ({"a": entry(-2, 2)}, b"xx", "a: offsets -2"),
    "overlap": ({"a": entry(0, 4), "b": entry(2, 6)}, b"x" * 6, "b: overlaps"),
    "hole": ({"a": entry(0, 2), "b": entry(4, 6)}, b"x" * 6, "b: follows a hole"),
    "bytes left over": ({"a": entry(0, 2)}, b"xxx", "belong to no tensor"),
    "bytes missing": ({"a": entry(0, 9)}, b"xxx", "cut short"),
    "name twice": (
        b'{"a":{"dtype":"U8","shape":[1],"data_offsets":[0,1]},"a":{"dtype":"U8","shape":[1],"data_offsets":[1,2]}}',
        b"xx",
        "a: stored 2 times",
    ),
}


@pytest.mark.parametrize(("header", "data", "text"), DAMAGE.values(), ids=DAMAGE.keys())
def test_damage_is_named(tmp_path: Path, header: object, data: bytes, text: str):
    write_raw(tmp_path / SINGLE, header, data)
    with pytest.raises(FormatError, match=text):
        list_tensors(tmp_path)


@pytest.mark.parametrize("size", [0, 7, 8, 60, -1])
def test_a_truncated_file_is_an_error_at_any_cut(tmp_path: Path, size: int):
    save_file(tiny(), tmp_path / SINGLE)
    whole = (tmp_path / SINGLE).read_bytes()
    (tmp_path / SINGLE).write_bytes(whole[:size])
    with pytest.raises(FormatError, match="cut short"):
        list_tensors(tmp_path)


def test_a_header_that_claims_too_much_is_refused_unread(tmp_path: Path):
    with (tmp_path / SINGLE).open("wb") as stream:
        stream.write(struct.pack("<Q", 100_000_001))
        stream.truncate(8 + 100_000_001)  # sparse: takes no space
    with pytest.raises(FormatError, match="header of 100000001 bytes"):
        list_tensors(tmp_path)


def test_all_problems_of_all_files_come_at_once(tmp_path: Path):
    write_raw(tmp_path / "x.safetensors", {"a": entry(0, 1, dtype="Q4"), "b": entry(1, 2, dtype="Q5")}, b"xx")
    write_raw(tmp_path / "y.safetensors", {"c": entry(0, 9)}, b"x")
    weights = {"a": "x.safetensors", "b": "x.safetensors", "c": "y.safetensors", "d": "gone.safetensors"}
    (tmp_path / INDEX).write_text(json.dumps({"weight_map": weights}))
    with pytest.raises(FormatError) as caught:
        list_tensors(tmp_path)
    message = str(caught.value)
    assert "4 problem(s)" in message
    for text in ("dtype Q4", "dtype Q5", "cut short", "gone.safetensors: named by"):
        assert text in message


@pytest.mark.parametrize(
    ("index", "text"),
    [
        ({"a": "x.safetensors", "b": "x.safetensors"}, f"b: {INDEX} says x.safetensors, it is in None"),
        ({"b": "x.safetensors"}, f"a: {INDEX} says None, it is in x.safetensors"),
        ({"a": "../x.safetensors"}, "plain file names"),
        ({"a": ".."}, r"\.\.: named by"),
        ({}, "no weight_map"),
        (None, "no weight_map"),
        ("not json", "not JSON"),
    ],
)
def test_index_and_files_must_agree(tmp_path: Path, index: object, text: str):
    write_raw(tmp_path / "x.safetensors", {"a": entry(0, 1)}, b"x")
    body = index if isinstance(index, str) else json.dumps({"weight_map": index})
    (tmp_path / INDEX).write_text(body)
    with pytest.raises(FormatError, match=text):
        list_tensors(tmp_path)


def test_a_tensor_in_two_shards_is_an_error(tmp_path: Path):
    for name in ("x.safetensors", "y.safetensors"):
        write_raw(tmp_path / name, {"a": entry(0, 1), name[0]: entry(1, 2)}, b"xx")
    weights = {"a": "x.safetensors", "x": "x.safetensors", "y": "y.safetensors"}
    (tmp_path / INDEX).write_text(json.dumps({"weight_map": weights}))
    with pytest.raises(FormatError, match="a: stored 2 times"):
        list_tensors(tmp_path)


def test_nothing_there_is_a_missing_file(tmp_path: Path):
    with pytest.raises(MissingFile, match="no safetensors checkpoint"):
        list_tensors(tmp_path)
