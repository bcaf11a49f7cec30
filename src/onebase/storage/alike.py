"""Adapters that differ in their values alone: what was proved of one holds for the next, which costs its bytes only.

The first adapter with some config and some header of its tensor file is read and checked in full. A later one with the
same bytes in both has the same names, shapes, dtypes, target modules and base fingerprint; only its values are new, and
those are read and checked each time.
"""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any, NamedTuple

import torch

from onebase.adapters.adapter import Adapter
from onebase.errors import FormatError, OnebaseError
from onebase.storage.adapter_files import CONFIG, TENSORS, read_sidecar
from onebase.storage.format import HasModel, load_adapter, origin_of
from onebase.storage.peft_tensors import to_peft_tensors
from onebase.storage.shards import DTYPES, MAX_HEADER, list_tensors

_WIDENED = ("F32", "F16", "BF16")
_MOST = 64  # kinds of adapters that are remembered


class _Head(NamedTuple):
    """What tells adapters of one kind: the bytes of the config, and of the tensor file before its tensors."""

    config: bytes
    header: bytes


class _Kind(NamedTuple):
    """What was proved of the first adapter of a kind."""

    adapter: Adapter  # its tensors are empty
    raw: dict[str, Any]  # the config
    metadata: dict[str, str]  # the tensor file's
    start: tuple[Any, ...]  # what the sidecar had beside where the adapter came from
    dtype: torch.dtype
    order: tuple[tuple[str, str], ...]  # in the file: (module path, field)
    shapes: tuple[torch.Size, ...]


class AdapterReader:
    """Reads adapters for one base, as `load_adapter` does; their tensors are in memory of their own."""

    def __init__(self, base: HasModel) -> None:
        self._base = base
        self._kinds: dict[_Head, _Kind] = {}

    def read(self, folder: str | Path) -> Adapter:
        """The adapter in a folder. Raises what `load_adapter` raises."""
        folder = Path(folder)
        head = _read_head(folder)
        kind = self._kinds.get(head) if head else None
        if kind is not None and head is not None:
            sidecar = read_sidecar(folder, kind.metadata)
            if _start(sidecar) == kind.start:
                return _filled(kind, folder, len(head.header), origin_of(kind.raw, sidecar, kind.metadata))
        adapter = load_adapter(folder, self._base)
        made = _kind(folder, adapter, head) if head and head == _read_head(folder) else None
        if made is not None and head is not None:
            while len(self._kinds) >= _MOST:
                del self._kinds[next(iter(self._kinds))]
            self._kinds[head] = made
        return _copied(adapter)


def _read_head(folder: Path) -> _Head | None:
    """None where the files are not there, or not as they should be: the full reading says why."""
    try:
        with (folder / TENSORS).open("rb") as file:
            length = file.read(8)
            size = int.from_bytes(length, "little")
            if len(length) < 8 or size > MAX_HEADER or (folder / CONFIG).stat().st_size > MAX_HEADER:
                return None
            return _Head((folder / CONFIG).read_bytes(), length + file.read(size))
    except OSError:
        return None


def _start(sidecar: dict[str, Any]) -> tuple[Any, ...]:
    return bool(sidecar), sidecar.get("start", ""), sidecar.get("tokens", {})


def _kind(folder: Path, adapter: Adapter, head: _Head) -> _Kind | None:
    """What holds for all adapters of this one's kind; None where more than values may differ between them."""
    try:
        stored = sorted(list_tensors(folder / TENSORS), key=lambda info: info.start)
        metadata: dict[str, str] = json.loads(head.header[8:]).get("__metadata__", {})
        raw: dict[str, Any] = json.loads(head.config)
        sidecar = read_sidecar(folder, metadata)
    except (OnebaseError, OSError, ValueError):
        return None
    dtypes = {info.dtype for info in stored}
    names = {id(tensor): name for name, tensor in to_peft_tensors(adapter).items()}
    found = {
        names.get(id(tensor)): (path, field)
        for path, low in adapter.lowrank.items()
        for field, tensor in low.tensors().items()
    }
    # Tensors that are not stored as we hold them, or besides: experts, convolutions, copies of the base's.
    if adapter.full or adapter.tokens or {info.name for info in stored} != found.keys():
        return None
    if len(dtypes) != 1 or not dtypes.issubset(_WIDENED):
        return None
    low = {
        path: one._replace(**{name: torch.empty(0) for name in one.tensors()})
        for path, one in adapter.lowrank.items()
    }
    order = tuple(found[info.name] for info in stored)
    shapes = tuple(torch.Size(getattr(adapter.lowrank[path], field).shape) for path, field in order)
    if shapes != tuple(torch.Size(info.shape) for info in stored):
        return None
    return _Kind(
        replace(adapter, lowrank=low), raw, metadata, _start(sidecar), DTYPES[dtypes.pop()], order, shapes
    )


def _filled(kind: _Kind, folder: Path, start: int, origin: Any) -> Adapter:
    """The adapter of this kind with the folder's values, which are read once, in one piece."""
    path, count = folder / TENSORS, sum(shape.numel() for shape in kind.shapes)
    flat = torch.empty(count, dtype=kind.dtype)
    data: Any = flat.view(torch.uint8).numpy()
    with path.open("rb") as file:
        file.seek(start)
        if file.readinto(data) != data.nbytes or file.read(1):
            raise FormatError(f"read {path}", f"broken or cut short ({path.stat().st_size} bytes)")
    flat = flat.float()
    if count and not all(bound.isfinite() for bound in flat.aminmax()):
        raise FormatError(f"adapter {folder} is broken", "its tensors hold NaN or infinity")
    fields: dict[str, dict[str, torch.Tensor]] = {}
    parts = flat.split([shape.numel() for shape in kind.shapes])
    for (module, field), part, shape in zip(kind.order, parts, kind.shapes, strict=True):
        fields.setdefault(module, {})[field] = part.view(shape)
    low = {module: one._replace(**fields[module]) for module, one in kind.adapter.lowrank.items()}
    return replace(kind.adapter, lowrank=low, origin=origin)


def _copied(adapter: Adapter) -> Adapter:
    """The adapter with its tensors in memory: those that map a file would change with it, or be gone."""
    low = {
        path: one._replace(**{name: tensor.clone() for name, tensor in one.tensors().items()})
        for path, one in adapter.lowrank.items()
    }
    full = {path: {n: t.clone() for n, t in state.items()} for path, state in adapter.full.items()}
    tokens = {path: one._replace(rows=one.rows.clone()) for path, one in adapter.tokens.items()}
    return replace(adapter, lowrank=low, full=full, tokens=tokens)
