"""A merge from file to file: a plain model's folder, written piece by piece in constant memory."""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Callable, Generator, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack, contextmanager
from itertools import pairwise
from math import prod
from pathlib import Path
from threading import Lock
from typing import Any, NamedTuple

import torch
from torch import Tensor

from onebase.adapters.adapter import LowRank, block
from onebase.adapters.kinds import KINDS, is_parameter
from onebase.errors import BaseError, OutputError, OutputExists
from onebase.files import atomic_folder
from onebase.storage.shards import DTYPE_NAMES, DTYPES, INDEX, MAX_SHARD, SINGLE, TensorInfo, read_tensor
from onebase.transforms.merge import (
    FLOATS,
    Change,
    Direct,
    Fused,
    MergePlan,
    Part,
    Rows,
    Shift,
    changed_tensor,
)

PIECE = 1 << 18  # values of a tensor that are read, changed and written at a time: they stay in the cache
THREADS = 2  # one computes while another waits for memory; more gain nothing, as writing is most of the work
# What makes a folder of weights a model that loads: configuration, tokenizer, template, licence, how it pools.
BESIDE = (
    *("generation_config.json", "*processor_config.json", "tokenizer*", "vocab.*", "merges.txt", "*.model"),
    *("special_tokens_map.json", "added_tokens.json", "chat_template*", "*.jinja", "LICENSE*", "NOTICE*"),
    *(
        "modules.json",
        "sentence_bert_config.json",
        "config_sentence_transformers.json",
        "1_Pooling/config.json",
    ),
)


class OutputOptions(NamedTuple):
    """How a merged model is written. `dtype`: None keeps each tensor's own."""

    dtype: torch.dtype | None = None
    shard_bytes: int = MAX_SHARD


def merge_files(plan: MergePlan, output: str | Path, options: OutputOptions = OutputOptions()) -> Path:  # noqa: B008
    """Write the merged model as a folder that transformers loads, as a whole or not at all.

    Tensors go through piece by piece: an update is added in float32 and rounded once, the rest is copied as it
    stands. Two need the whole tensor at once: DoRA on a weight that is stored (in, out), whose norms run across
    the pieces, and parameters that are stored under other names than the model's (a stack of experts).

    Raises OutputExists, OutputError where the output would lie in the base or the disk refuses, or BaseError where
    transformers cannot take such a parameter apart again.
    """
    target = Path(output)
    _check_output(plan, target, options)
    shards = _shards(plan.parts, options)
    made: dict[str, Tensor] = {}  # pieces of parameters, made at the first and waiting for their turn
    with atomic_folder(target) as folder, _one_thread():
        for name, parts in shards.items():
            _write_shard(folder / name, parts, options.dtype, made)
        if len(shards) > 1:
            weight_map = {part.name: name for name, parts in shards.items() for part in parts}
            total = sum(_size(part, options.dtype) for part in plan.parts)
            _write_json(folder / INDEX, {"metadata": {"total_size": total}, "weight_map": weight_map})
        _write_json(folder / "config.json", _configuration(plan, options.dtype))
        for source in sorted({path for pattern in BESIDE for path in plan.folder.glob(pattern)}):
            if source.is_file():
                beside = folder / source.relative_to(plan.folder)
                beside.parent.mkdir(exist_ok=True)
                shutil.copyfile(source, beside)
        for name, content in plan.files.items():
            (folder / name).write_bytes(content)
    return target


@contextmanager
def _one_thread() -> Generator[None]:
    """Pieces are too small to share: on a busy machine torch's threads wait longer for each other than they work."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(before)


def _check_output(plan: MergePlan, target: Path, options: OutputOptions) -> None:
    asked, place = f"merge into {target}", target.resolve()
    if place.is_relative_to(plan.folder.resolve()):
        raise OutputError(asked, f"it lies in the base {plan.folder}", hint="choose a folder elsewhere")
    if target.exists():
        raise OutputExists(asked, "it exists already", hint="choose another folder")
    above = next(parent for parent in place.parents if parent.exists())
    needed, free = sum(_size(part, options.dtype) for part in plan.parts), shutil.disk_usage(above).free
    if needed > free:
        raise OutputError(asked, f"{needed / 1e9:.1f} GB are needed, {free / 1e9:.1f} GB are free")


def _dtype(part: Part, asked: torch.dtype | None) -> torch.dtype:
    """The dtype that a tensor is written in; integers stay what they are."""
    return asked if asked is not None and part.source.dtype in FLOATS else DTYPES[part.source.dtype]


def _size(part: Part, asked: torch.dtype | None) -> int:
    return prod(part.shape) * _dtype(part, asked).itemsize


def _shards(parts: Sequence[Part], options: OutputOptions) -> dict[str, list[Part]]:
    """File name -> its tensors, cut where the next one would make a file larger than allowed."""
    cuts, filled = [0], 0
    for place, part in enumerate(parts):
        size = _size(part, options.dtype)
        if filled and filled + size > options.shard_bytes:
            cuts.append(place)
            filled = 0
        filled += size
    groups = [list(parts[start:end]) for start, end in pairwise([*cuts, len(parts)])]
    if len(groups) == 1:
        return {SINGLE: groups[0]}
    names = [f"model-{n:05d}-of-{len(groups):05d}.safetensors" for n in range(1, len(groups) + 1)]
    return dict(zip(names, groups, strict=True))


def _write_shard(
    path: Path, parts: Sequence[Part], asked: torch.dtype | None, made: dict[str, Tensor]
) -> None:
    """One safetensors file; wide dtypes first, so that every tensor lies at a multiple of its item's size."""
    header: dict[str, Any] = {"__metadata__": {"format": "pt"}}
    parts, end = sorted(parts, key=lambda part: (-_dtype(part, asked).itemsize, part.name)), 0
    starts: list[int] = []
    for part in parts:
        start, end = end, end + _size(part, asked)
        starts.append(start)
        kind = DTYPE_NAMES[_dtype(part, asked)]
        header[part.name] = {"dtype": kind, "shape": part.shape, "data_offsets": (start, end)}
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)
    with path.open("wb", buffering=0) as stream, ExitStack() as opened:
        file = stream.fileno()
        sources = {path: opened.enter_context(path.open("rb", buffering=0)) for path in _files(parts)}
        os.ftruncate(file, 8 + len(text) + end)  # fails at once where so large a file is not allowed
        _write_at(file, memoryview(len(text).to_bytes(8, "little") + text), 0)
        places = [(part, 8 + len(text) + start) for part, start in zip(parts, starts, strict=True)]
        pieces = (piece for part, place in places for piece in _pieces(part, place, _dtype(part, asked)))
        _in_threads(lambda piece: _merge_piece(sources[piece.source.file].fileno(), file, piece), pieces)
        for part, place in places:
            if isinstance(part.change, Fused):
                if part.name not in made:
                    made |= _split(part.change, asked)
                _write_at(file, _bytes(made.pop(part.name)), place)


def _files(parts: Sequence[Part]) -> set[Path]:
    """The base's files that these tensors come from."""
    return {part.source.file for part in parts}


class _Rows(NamedTuple):
    """A tensor as rows that can be merged apart, `per_block` of them in each block of its update."""

    rows: int
    per_block: int
    width: int  # values in a row
    step: int  # rows at a time

    def ranges(self) -> Iterator[tuple[int, int]]:
        """(start, end) of the rows of each piece; none crosses two blocks."""
        for first in range(0, self.rows, self.per_block):
            for start in range(first, first + self.per_block, self.step):
                yield start, min(start + self.step, first + self.per_block)


def _rows(shape: Sequence[int], change: Change) -> _Rows:
    change = change.under if isinstance(change, Rows) else change
    low = change if isinstance(change, LowRank) else None
    blocks = low.blocks if low else 1
    rows = prod(shape[:2]) if len(shape) == 3 and low and is_parameter(low.kind) else prod(shape[:1])
    width = prod(shape) // max(rows, 1)
    # DoRA's norm of an output runs over all of its inputs: where these are the rows, all at once.
    whole = low is not None and low.magnitude is not None and KINDS[low.kind].transposed
    return _Rows(rows, rows // blocks, width, rows if whole else max(1, PIECE // max(width, 1)))


def _of_rows(change: Direct | None, start: int, end: int, per_block: int) -> Direct | None:
    """The part of a change that concerns some rows of the stored tensor."""
    if isinstance(change, Shift):
        return Shift(change.by[start:end, None])
    if isinstance(change, Tensor):
        return change.reshape(change.shape[0] if change.ndim else 1, -1)[start:end]
    if isinstance(change, Rows):
        under = _of_rows(change.under, start, end, per_block)
        assert under is None or isinstance(under, LowRank)
        tokens = change.part(start, end)
        return Rows(tokens, under) if tokens.ids else under
    if change is None:
        return None
    number, offset = divmod(start, per_block)
    low, inside = block(change, number), slice(offset, offset + end - start)
    if KINDS[low.kind].transposed:
        return low._replace(A=low.A[:, inside])
    return low._replace(B=low.B[inside], magnitude=None if low.magnitude is None else low.magnitude[inside])


class _Piece(NamedTuple):
    """Some rows of a tensor: where they are read, what happens to them, where they are written."""

    source: TensorInfo
    start: int  # bytes in the source's file
    size: int  # bytes
    rows: int
    change: Direct | None
    place: int  # bytes in the output
    dtype: torch.dtype  # of the output


def _pieces(part: Part, place: int, dtype: torch.dtype) -> Iterator[_Piece]:
    """The merged tensor in pieces; nothing is read yet."""
    if isinstance(part.change, Fused) or not prod(part.shape):
        return
    rows = part.change if isinstance(part.change, Rows) else None
    cut = _rows(part.source.shape if rows else part.shape, part.change)
    size = DTYPES[part.source.dtype].itemsize
    for start, end in cut.ranges():
        change = _of_rows(part.change, start, end, cut.per_block)
        first, count = part.source.start + start * cut.width * size, (end - start) * cut.width * size
        yield _Piece(
            *(part.source, first, count, end - start, change),
            place + start * cut.width * dtype.itemsize,
            dtype,
        )
    if rows and (new := rows.part(cut.rows, part.shape[0]).rows).numel():
        end = place + cut.rows * cut.width * dtype.itemsize
        yield _Piece(part.source, part.source.end, 0, len(new), new, end, dtype)


def _in_threads(work: Callable[[_Piece], None], pieces: Generator[_Piece]) -> None:
    """Do all the work in a few threads, this one too, which take turns at the pieces; the first error stops all."""
    turn = Lock()

    def run() -> None:
        try:
            while (piece := take()) is not None:
                work(piece)
        except BaseException:
            with turn:
                pieces.close()  # nothing is left to take
            raise

    def take() -> _Piece | None:
        with turn:
            return next(pieces, None)

    # OpenMP and MKL keep the number of threads for each thread: what `_one_thread` said was for its own.
    with ThreadPoolExecutor(THREADS, initializer=torch.set_num_threads, initargs=(1,)) as pool:
        others = [pool.submit(run) for _ in range(THREADS - 1)]
        run()
        for other in others:
            other.result()


def _merge_piece(source: int, sink: int, piece: _Piece) -> None:
    if isinstance(piece.change, Tensor):
        _write_at(sink, _bytes(piece.change.to(piece.dtype)), piece.place)
        return
    raw, stored = _read(source, piece), DTYPES[piece.source.dtype]
    if piece.change is None and piece.dtype == stored:
        _write_at(sink, raw.numpy().data, piece.place)
        return
    values = _merged(raw.view(stored).reshape(piece.rows, -1), piece.change, piece.dtype)
    _write_at(sink, _bytes(values), piece.place)


def _merged(values: Tensor, change: Direct | None, dtype: torch.dtype) -> Tensor:
    """Changed in float32 at least, and rounded once. The values' own memory may be used."""
    if change is None:
        return values.to(dtype)
    wide = values.to(torch.promote_types(values.dtype, torch.float32))
    return changed_tensor(wide, change, in_place=True).to(dtype)


def _read(source: int, piece: _Piece) -> Tensor:
    """The piece's bytes. Not memory-mapped: mapped pages would count as ours until the file is done."""
    raw = torch.empty(piece.size, dtype=torch.uint8)
    view, start = raw.numpy().data, piece.start
    while view and (got := os.preadv(source, [view], start)):
        view, start = view[got:], start + got
    if view:
        raise OSError("a file of the base ended early: it was changed while it was read")
    return raw


def _write_at(sink: int, data: memoryview, place: int) -> None:
    while data:
        done = os.pwrite(sink, data, place)
        data, place = data[done:], place + done


def _flat(tensor: Tensor) -> Tensor:
    return tensor.contiguous().reshape(-1).view(torch.uint8)


def _bytes(tensor: Tensor) -> memoryview:
    return _flat(tensor).numpy().data


def _split(fused: Fused, asked: torch.dtype | None) -> dict[str, Tensor]:
    """The stored pieces of some parameters after their change; it holds these parameters about three times."""
    stored = {info.name: read_tensor(info) for info in fused.sources}
    whole, split = dict(fused.fusion.join(stored)), fused.fusion.split
    if not _same(split(whole), stored):
        names = ", ".join(fused.fusion.parameters)
        hint = "merge in memory instead (onebase.transforms.merge.merge_in_memory), then save_pretrained"
        raise BaseError(
            f"merge {names}", "what transformers makes of the stored tensors has no way back", hint=hint
        )
    del stored
    for name, tensor in whole.items():
        whole[name] = _changed_whole(tensor, fused.changes.get(name), asked or tensor.dtype)
    return {name: tensor.contiguous() for name, tensor in split(whole).items()}


def _same(some: Mapping[str, Tensor], others: Mapping[str, Tensor]) -> bool:
    return some.keys() == others.keys() and all(
        tensor.dtype == others[name].dtype and torch.equal(_flat(tensor), _flat(others[name]))
        for name, tensor in some.items()
    )


def _changed_whole(tensor: Tensor, change: Direct | None, dtype: torch.dtype) -> Tensor:
    cut, made = _rows(tensor.shape, change), torch.empty(tensor.shape, dtype=dtype)
    rows, result = tensor.reshape(cut.rows, -1), made.view(cut.rows, -1)
    for start, end in cut.ranges():
        result[start:end] = _merged(
            rows[start:end].clone(), _of_rows(change, start, end, cut.per_block), dtype
        )
    return made


def _configuration(plan: MergePlan, dtype: torch.dtype | None) -> dict[str, Any]:
    settings: dict[str, Any] = dict(plan.settings)
    config = json.loads((plan.folder / "config.json").read_text(encoding="utf-8"))
    if dtype is not None:
        config.pop("torch_dtype", None)  # the older name
        settings["dtype"] = str(dtype).removeprefix("torch.")
    return config | settings


def _write_json(path: Path, value: Mapping[str, Any]) -> None:
    path.write_text(json.dumps(value, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")
