"""An adapter made part of the weights: file to file in constant memory, or in memory with an exact way back."""

from __future__ import annotations

import json
import shutil
from collections import defaultdict
from collections.abc import Generator, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass, field
from io import FileIO
from itertools import pairwise
from pathlib import Path
from typing import Any, BinaryIO, NamedTuple

import torch
from torch import Tensor, nn

from onebase.adapter import Adapter, LowRank
from onebase.errors import AdapterNameError, BaseMismatch, OutputError, OutputExists
from onebase.files import atomic_folder
from onebase.injection import MERGED, adapter_names, fit_problems, with_kinds
from onebase.kinds import KINDS, merged_weight
from onebase.layers import base_modules
from onebase.shards import DTYPE_NAMES, DTYPES, INDEX, MAX_SHARD, SINGLE, TensorInfo

PIECE = 1 << 20  # bytes of a tensor that are read, changed and written at a time: they stay in the cache
FLOATS = ("F64", "F32", "F16", "BF16")
# What makes a folder of weights a model that loads: configuration, tokenizer, template, licence.
BESIDE = (
    *("generation_config.json", "*processor_config.json", "tokenizer*", "vocab.*", "merges.txt", "*.model"),
    *("special_tokens_map.json", "added_tokens.json", "chat_template*", "*.jinja", "LICENSE*", "NOTICE*"),
)


Change = LowRank | Tensor | None
"""What happens to a stored tensor: an update is added, another tensor takes its place, or nothing."""


@dataclass(frozen=True)
class Skeleton:
    """A model folder without its weights: the modules, and where each parameter is stored."""

    folder: Path
    model: nn.Module  # on the meta device
    tensors: tuple[TensorInfo, ...]
    stored: Mapping[str, str]  # parameter -> the stored tensor that it is loaded from as it stands
    ties: Mapping[str, str]  # parameter -> the one whose weight it shares
    unties: bool  # whether tie_word_embeddings=false makes the model untie them
    fingerprint: str


class Part(NamedTuple):
    """One tensor of the merged model: its name, the stored tensor that it comes from, and the change."""

    name: str
    source: TensorInfo
    change: Change = None


@dataclass(frozen=True)
class MergePlan:
    """A merge that was checked: every tensor of the output, and what changes in its configuration."""

    folder: Path
    parts: tuple[Part, ...]
    settings: Mapping[str, Any] = field(default_factory=dict[str, Any])

    @property
    def changed(self) -> int:
        """The number of tensors that differ from the base's."""
        return sum(part.change is not None for part in self.parts)


def make_plan(base: Skeleton, adapter: Adapter) -> MergePlan:
    """What merging means for each stored tensor. Raises BaseMismatch that lists everything that does not fit.

    Where an adapter changes one of several tied weights (an embedding and not the head, say), the output holds
    each of them, and its configuration says that they are no longer tied.
    """
    changes = _changes(with_kinds(base.model, adapter))
    infos = {info.name: info for info in base.tensors}
    shapes = {name: tuple(tensor.shape) for name, tensor in base.model.state_dict().items()}
    groups = _tied_groups(base)
    loose = [group for group in groups if any(name in changes for name in group)]
    owners = {name: _owner(name, base, groups) for name in [*changes, *(n for g in loose for n in g)]}
    problems = fit_problems(base.model, adapter)
    problems += [
        text for name in changes if (text := _stored_problem(name, infos.get(owners[name]), shapes.get(name)))
    ]
    if loose and not base.unties:
        names = ", ".join(name for group in loose for name in group)
        problems.append(f"{names}: this architecture always ties them, so only one of them cannot be changed")
    if problems:
        raise BaseMismatch(
            f"the adapter cannot be merged into {base.folder}", "\n  " + "\n  ".join(sorted(set(problems)))
        )
    parts = {info.name: Part(info.name, info) for info in base.tensors}
    for name, owner in owners.items():
        own = base.stored.get(name, name)
        parts[own] = Part(own, infos[owner], changes.get(name))
    return MergePlan(base.folder, tuple(parts.values()), {"tie_word_embeddings": False} if loose else {})


def _changes(adapter: Adapter) -> dict[str, LowRank | Tensor]:
    low: dict[str, LowRank | Tensor] = {f"{path}.weight": low for path, low in adapter.lowrank.items()}
    return low | {f"{path}.{n}": t for path, state in adapter.full.items() for n, t in state.items()}


def _tied_groups(base: Skeleton) -> list[list[str]]:
    groups: defaultdict[str, list[str]] = defaultdict(list)
    for name, source in base.ties.items():
        groups[source] = [*(groups[source] or [source]), name]
    return list(groups.values())


def _owner(name: str, base: Skeleton, groups: Sequence[Sequence[str]]) -> str:
    """The stored tensor that a parameter is loaded from: its own, or that of one it is tied to; else empty."""
    group = next((group for group in groups if name in group), ())
    return next((base.stored[one] for one in (name, *group) if one in base.stored), "")


def _stored_problem(name: str, info: TensorInfo | None, shape: tuple[int, ...] | None) -> str:
    if info is None:
        return f"{name}: the base's files hold no tensor for it (or only pieces of it under other names)"
    if info.dtype not in FLOATS:
        return f"{name}: stored as {info.dtype}, which cannot carry an update"
    fits = shape in (None, info.shape)  # None: fit_problems has named it
    return "" if fits else f"{name}: stored with shape {info.shape}, the configuration says {shape}"


class OutputOptions(NamedTuple):
    """How a merged model is written. `dtype`: None keeps each tensor's own."""

    dtype: torch.dtype | None = None
    shard_bytes: int = MAX_SHARD


def merge_files(plan: MergePlan, output: str | Path, options: OutputOptions = OutputOptions()) -> Path:  # noqa: B008
    """Write the merged model as a folder that transformers loads, as a whole or not at all.

    Tensors go through piece by piece: an update is added in float32 and rounded once, the rest is copied as it
    stands. Raises OutputExists, or OutputError where the output would lie in the base or the disk refuses.
    """
    target = Path(output)
    _check_output(plan, target, options)
    shards = _shards(plan.parts, options)
    with atomic_folder(target) as folder, _one_thread():
        for name, parts in shards.items():
            _write_shard(folder / name, parts, options.dtype)
        if len(shards) > 1:
            weight_map = {part.name: name for name, parts in shards.items() for part in parts}
            total = sum(_size(part, options.dtype) for part in plan.parts)
            _write_json(folder / INDEX, {"metadata": {"total_size": total}, "weight_map": weight_map})
        _write_json(folder / "config.json", _configuration(plan, options.dtype))
        for source in sorted({path for pattern in BESIDE for path in plan.folder.glob(pattern)}):
            if source.is_file():
                shutil.copyfile(source, folder / source.name)
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
    stored = part.source.end - part.source.start
    return stored // DTYPES[part.source.dtype].itemsize * _dtype(part, asked).itemsize


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


def _write_shard(path: Path, parts: Sequence[Part], asked: torch.dtype | None) -> None:
    """One safetensors file; wide dtypes first, so that every tensor lies at a multiple of its item's size."""
    header: dict[str, Any] = {"__metadata__": {"format": "pt"}}
    parts, end = sorted(parts, key=lambda part: (-_dtype(part, asked).itemsize, part.name)), 0
    for part in parts:
        start, end = end, end + _size(part, asked)
        kind = DTYPE_NAMES[_dtype(part, asked)]
        header[part.name] = {"dtype": kind, "shape": part.source.shape, "data_offsets": (start, end)}
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)
    with path.open("wb") as sink:
        sink.write(len(text).to_bytes(8, "little") + text)
        _write_behind(sink, (piece for part in parts for piece in _pieces(part, _dtype(part, asked))))


def _write_behind(sink: BinaryIO, pieces: Iterable[bytearray | memoryview]) -> None:
    """Write each piece while the next one is made."""
    with ThreadPoolExecutor(1) as pool:
        writing: Future[int] | None = None
        for piece in pieces:
            if writing is not None:
                writing.result()
            writing = pool.submit(sink.write, piece)
        if writing is not None:
            writing.result()


def _pieces(part: Part, dtype: torch.dtype) -> Iterator[bytearray | memoryview]:
    """The merged tensor's bytes, some rows at a time."""
    source, stored = part.source, DTYPES[part.source.dtype]
    rows = source.shape[0] if source.shape else 1
    row_bytes = (source.end - source.start) // max(rows, 1)
    step = max(1, PIECE // max(row_bytes, 1))
    with source.file.open("rb", buffering=0) as stream:
        stream.seek(source.start)
        for start in range(0, rows if row_bytes else 0, step):
            end = min(start + step, rows)
            if isinstance(part.change, Tensor):
                yield _bytes(part.change.reshape(rows, -1)[start:end].to(dtype))
                continue
            raw = _read(stream, (end - start) * row_bytes)
            if part.change is None and dtype == stored:
                yield raw
                continue
            piece = torch.frombuffer(raw, dtype=stored).reshape(end - start, -1)
            if part.change is not None:
                wide = torch.promote_types(stored, torch.float32)  # merged_weight rounds to its input's dtype
                piece = merged_weight(piece.to(wide), _rows(part.change, start, end))
            yield _bytes(piece.to(dtype))


def _read(stream: FileIO, count: int) -> bytearray:
    """Exactly `count` bytes. Not memory-mapped: mapped pages would count as ours until the file is done."""
    raw = bytearray(count)
    view = memoryview(raw)
    while view and (got := stream.readinto(view)):
        view = view[got:]
    if view:
        raise OSError("a file of the base ended early: it was changed while it was read")
    return raw


def _rows(low: LowRank, start: int, end: int) -> LowRank:
    """The update of some rows of the stored weight."""
    if KINDS[low.kind].transposed:
        return low._replace(A=low.A[:, start:end])
    return low._replace(B=low.B[start:end])


def _bytes(tensor: Tensor) -> memoryview:
    return tensor.contiguous().reshape(-1).view(torch.uint8).numpy().data


def _configuration(plan: MergePlan, dtype: torch.dtype | None) -> dict[str, Any]:
    settings: dict[str, Any] = dict(plan.settings)
    config = json.loads((plan.folder / "config.json").read_text(encoding="utf-8"))
    if dtype is not None:
        config.pop("torch_dtype", None)  # the older name
        settings["dtype"] = str(dtype).removeprefix("torch.")
    return config | settings


def _write_json(path: Path, value: Mapping[str, Any]) -> None:
    path.write_text(json.dumps(value, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")


class _Swap(NamedTuple):
    module: nn.Module
    name: str
    original: Tensor


def merge_in_memory(model: nn.Module, adapter: Adapter) -> nn.Module:
    """Give the adapted layers new weights W + s·B·A, so that the adapter costs nothing; `unmerge` undoes it.

    Returns the model. The base's own tensors are set aside, not written to: they may be memory-mapped, or tied
    to a layer that the adapter leaves alone. Memory: one copy of the adapted layers. Raises BaseMismatch, or
    AdapterNameError where the model already carries adapters, whose updates would be added to the merged weights.
    """
    carried = ["a merged one"] if MERGED in vars(model) else adapter_names(model)
    if carried:
        found = "the model already carries " + ", ".join(carried)
        raise AdapterNameError("merge in memory", found, hint="unmerge or eject first")
    if problems := fit_problems(model, adapter):
        raise BaseMismatch("the adapter does not fit this base", "\n  " + "\n  ".join(problems))
    modules, swaps = dict(base_modules(model)), list[_Swap]()
    model.__dict__[MERGED] = swaps
    try:
        for name, change in _changes(with_kinds(model, adapter)).items():
            path, _, end = name.rpartition(".")
            swaps.append(_Swap(modules[path], end, getattr(modules[path], end)))
            _put(swaps[-1], _merged(swaps[-1].original, change))
    except BaseException:  # out of memory, for example
        unmerge(model)
        raise
    return model


def _merged(weight: Tensor, change: LowRank | Tensor) -> Tensor:
    if isinstance(change, Tensor):
        return change.to(weight.device, weight.dtype, copy=True)
    here = change._replace(A=change.A.to(weight.device), B=change.B.to(weight.device))
    return merged_weight(weight.detach(), here).contiguous()


def _put(swap: _Swap, value: Tensor) -> None:
    parameter = isinstance(swap.original, nn.Parameter) and not isinstance(value, nn.Parameter)
    setattr(swap.module, swap.name, nn.Parameter(value, requires_grad=False) if parameter else value)


def unmerge(model: nn.Module) -> nn.Module:
    """Put the base's own tensors back: the very same objects, so every bit and every tie is as before."""
    if MERGED not in vars(model):
        raise AdapterNameError("unmerge", "no adapter is merged into this model")
    for swap in model.__dict__.pop(MERGED):
        _put(swap, swap.original)
    return model


@contextmanager
def merged(model: nn.Module, adapter: Adapter) -> Generator[nn.Module]:
    """The model with this adapter in its weights, and as before afterwards."""
    merge_in_memory(model, adapter)
    try:
        yield model
    finally:
        unmerge(model)
