"""Safetensors checkpoints, one file or a sharded folder, read and written tensor by tensor.

A file is an 8-byte little-endian length, a JSON header of that length, and the tensors' bytes without holes
(https://github.com/huggingface/safetensors#format). The header is parsed here because the raw bytes are needed.
"""

from __future__ import annotations

import json
import math
import mmap
from collections import Counter
from collections.abc import Generator, Iterable, Mapping
from pathlib import Path
from typing import Any, NamedTuple

import torch
from safetensors import SafetensorError
from safetensors.torch import save_file
from torch import Tensor

from onebase.errors import FormatError, MissingFile, OutputError

SINGLE = "model.safetensors"
INDEX = "model.safetensors.index.json"
MAX_HEADER = 100_000_000  # bytes; the safetensors library's own limit
MAX_SHARD = 5_000_000_000  # bytes; the size hub uploads use

# The format's dtype names; the inverse names tensors in memory.
DTYPES: dict[str, torch.dtype] = {
    "F64": torch.float64,
    "F32": torch.float32,
    "F16": torch.float16,
    "BF16": torch.bfloat16,
    "F8_E4M3": torch.float8_e4m3fn,
    "F8_E5M2": torch.float8_e5m2,
    "C64": torch.complex64,
    "I64": torch.int64,
    "I32": torch.int32,
    "I16": torch.int16,
    "I8": torch.int8,
    "U64": torch.uint64,
    "U32": torch.uint32,
    "U16": torch.uint16,
    "U8": torch.uint8,
    "BOOL": torch.bool,
}
DTYPE_NAMES = {dtype: name for name, dtype in DTYPES.items()}


class TensorInfo(NamedTuple):
    """Where one stored tensor is: bytes `start` to `end` of `file`, row-major, of `dtype` (the file's name)."""

    name: str
    dtype: str
    shape: tuple[int, ...]
    file: Path
    start: int
    end: int


def list_tensors(path: str | Path) -> list[TensorInfo]:
    """All tensors of a safetensors file or of a checkpoint folder, sorted by name; no tensor is read.

    Raises MissingFile where there is none, FormatError with every problem of every file otherwise.
    """
    source = Path(path)
    problems: list[str] = []
    weight_map = _weight_map(source, problems)
    infos = [info for file in _files(source, weight_map, problems) for info in _read_file(file, problems)]
    problems += [
        f"{name}: stored {count} times"
        for name, count in Counter(info.name for info in infos).items()
        if count > 1
    ]
    if weight_map is not None and not problems:
        stored = {info.name: info.file.name for info in infos}
        wrong = sorted(
            name for name in weight_map.keys() | stored if weight_map.get(name) != stored.get(name)
        )
        problems += [
            f"{name}: {INDEX} says {weight_map.get(name)}, it is in {stored.get(name)}" for name in wrong
        ]
    if problems:
        raise FormatError(f"cannot read {source}", "\n  - ".join([f"{len(problems)} problem(s)", *problems]))
    return sorted(infos)


def tensor_bytes(info: TensorInfo) -> memoryview:
    """The tensor's bytes as they stand in the file, memory-mapped and read-only."""
    with info.file.open("rb") as stream:
        mapped = mmap.mmap(stream.fileno(), 0, access=mmap.ACCESS_READ)
    return memoryview(mapped)[info.start : info.end]


def read_tensor(info: TensorInfo) -> Tensor:
    """The tensor, copied out of the file, in its stored dtype and shape."""
    if info.start == info.end:
        return torch.empty(info.shape, dtype=DTYPES[info.dtype])
    return torch.frombuffer(bytearray(tensor_bytes(info)), dtype=DTYPES[info.dtype]).reshape(info.shape)


def write_shards(
    folder: str | Path,
    tensors: Iterable[tuple[str, Tensor]],
    max_shard_bytes: int = MAX_SHARD,
    metadata: Mapping[str, str] | None = None,
) -> list[Path]:
    """Write `tensors` to `folder` as `model.safetensors`, or as numbered shards with an index; return the files.

    Holds one shard at a time. Give tied tensors once. The folder should be one that `files.atomic_folder` made.
    Raises FormatError for no tensor or a name given twice, OutputError where the disk refuses.
    """
    folder = Path(folder)
    parts: list[Path] = []
    placed: list[tuple[str, int]] = []  # tensor name, number of its shard
    total = 0
    for shard in _grouped(tensors, max_shard_bytes):
        parts.append(folder / f"shard-{len(parts)}.partial")
        placed += [(name, len(parts) - 1) for name in shard]
        total += sum(tensor.nbytes for tensor in shard.values())
        try:
            save_file(shard, parts[-1], metadata={"format": "pt", **(metadata or {})})
        except (SafetensorError, OSError) as error:
            raise OutputError(f"cannot write {folder}", str(error)) from error
    repeated = [name for name, count in Counter(name for name, _ in placed).items() if count > 1]
    if repeated or not parts:
        raise FormatError(
            f"cannot write {folder}", f"tensors given twice: {repeated}" if parts else "no tensors"
        )
    count = len(parts)
    names = (
        [SINGLE] if count == 1 else [f"model-{n + 1:05d}-of-{count:05d}.safetensors" for n in range(count)]
    )
    if count > 1:
        index = {"metadata": {"total_size": total}, "weight_map": {name: names[n] for name, n in placed}}
        (folder / INDEX).write_text(json.dumps(index, indent=2), encoding="utf-8")
    return [part.rename(folder / name) for part, name in zip(parts, names, strict=True)]


def _grouped(tensors: Iterable[tuple[str, Tensor]], max_bytes: int) -> Generator[dict[str, Tensor]]:
    """Cut the stream where the next tensor would make the shard larger than `max_bytes`."""
    shard: dict[str, Tensor] = {}
    for name, tensor in tensors:
        stored = tensor.detach().cpu().contiguous()
        if stored.untyped_storage().nbytes() != stored.nbytes:
            stored = stored.clone()  # a view of something larger; safetensors writes whole storages only
        filled = sum(other.nbytes for other in shard.values()) + stored.nbytes > max_bytes
        if shard and (filled or name in shard):
            yield shard
            shard = {}
        shard[name] = stored
    if shard:
        yield shard


def _weight_map(source: Path, problems: list[str]) -> dict[str, str] | None:
    """The index's tensor name -> file name; None for a checkpoint of one file."""
    index = source / INDEX
    if source.is_file() or (source / SINGLE).exists() or not index.exists():
        return None
    try:
        match json.loads(index.read_text(encoding="utf-8")):
            case {"weight_map": {**weight_map}} if weight_map and all(map(_plain_name, weight_map.values())):
                return weight_map
            case _:
                problems.append(f"{INDEX}: no weight_map from tensor names to plain file names")
    except ValueError as error:
        problems.append(f"{INDEX}: not JSON ({error})")
    return {}


def _plain_name(name: object) -> bool:
    return isinstance(name, str) and name == Path(name).name != ""


def _files(source: Path, weight_map: dict[str, str] | None, problems: list[str]) -> list[Path]:
    if weight_map is None:
        file = source if source.is_file() else source / SINGLE
        if not file.is_file():
            raise MissingFile(
                f"no safetensors checkpoint at {source}", f"neither {SINGLE} nor {INDEX} is there"
            )
        return [file]
    files = [source / name for name in sorted(set(weight_map.values()))]
    problems += [f"{file.name}: named by {INDEX}, but missing" for file in files if not file.is_file()]
    return [file for file in files if file.is_file()]


def _read_file(file: Path, problems: list[str]) -> list[TensorInfo]:
    """The tensors of one file; what is wrong with it goes to `problems`."""
    size = file.stat().st_size
    try:
        entries, data_start = _header(file, size)
    except (ValueError, RecursionError) as error:
        problems.append(f"{file.name}: {error}")
        return []
    infos: list[TensorInfo] = []
    broken: list[str] = []
    for name, entry in entries:
        try:
            infos.append(_info(file, name, entry, data_start))
        except ValueError as error:
            broken.append(f"{file.name}: {name}: {error}")
    problems += broken or [f"{file.name}: {text}" for text in _layout_problems(infos, data_start, size)]
    return infos


def _header(file: Path, size: int) -> tuple[list[tuple[str, Any]], int]:
    """The header's entries, in order and with repetitions, and where the tensors' bytes begin."""
    with file.open("rb") as stream:
        length = int.from_bytes(stream.read(8), "little")
        if size < 8 or 8 + length > size:
            raise ValueError(f"cut short or not safetensors: {size} bytes, but the header says {8 + length}")
        if length > MAX_HEADER:
            raise ValueError(f"header of {length} bytes, more than the format's {MAX_HEADER}")
        header = json.loads(stream.read(length), object_pairs_hook=_Pairs)
    if not isinstance(header, _Pairs):
        raise ValueError("the header is no JSON object")
    "".join(name for name, _ in header).encode()  # half a surrogate pair is no name: ValueError
    texts = [value for name, held in header if name == "__metadata__" for value in _values(held)]
    if not all(isinstance(text, str) for text in texts):
        raise ValueError("__metadata__ holds more than texts")
    return [(name, entry) for name, entry in header if name != "__metadata__"], 8 + length


class _Pairs(list[tuple[str, Any]]):
    """A JSON object that keeps repeated keys, which a dict would hide."""


def _values(entry: object) -> list[Any]:
    return [value for _, value in entry] if isinstance(entry, _Pairs) else [None]


def _info(file: Path, name: str, entry: object, data_start: int) -> TensorInfo:
    fields = dict(entry) if isinstance(entry, _Pairs) else {}
    match fields:
        case {"dtype": str(dtype), "shape": [*shape], "data_offsets": [int(begin), int(end)]} if (
            type(begin) is type(end) is int
        ):
            pass
        case _:
            raise ValueError("entry lacks dtype, shape or data_offsets")
    if dtype not in DTYPES:
        raise ValueError(f"dtype {dtype} is not one of {', '.join(DTYPES)}")
    if not all(type(extent) is int and extent >= 0 for extent in shape):
        raise ValueError(f"shape {shape} is not a list of extents")
    wanted = math.prod(shape) * DTYPES[dtype].itemsize
    if begin < 0 or end - begin != wanted:
        raise ValueError(f"offsets {begin} to {end} do not hold the {wanted} bytes of {dtype} {shape}")
    return TensorInfo(name, dtype, tuple(shape), file, data_start + begin, data_start + end)


def _layout_problems(infos: list[TensorInfo], data_start: int, size: int) -> Generator[str]:
    """The format wants the tensors end to end, from the header to the file's last byte."""
    reached = data_start
    for info in sorted(infos, key=lambda info: (info.start, info.end)):
        if info.start != reached:
            kind = "overlaps the tensor before it" if info.start < reached else "follows a hole"
            yield f"{info.name}: {kind} (starts at byte {info.start}, not {reached})"
        reached = max(reached, info.end)
    if reached != size:
        kind = "cut short" if reached > size else "bytes that belong to no tensor"
        yield f"{kind}: {size} bytes, the header describes {reached}"
