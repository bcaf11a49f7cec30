"""Adapters that differ in their values alone: what was proved of one holds for the next, which costs its bytes only.

Config and header of the tensor file prove all but the values: names, shapes, dtypes, target modules, the base's
fingerprint. That is done once for each kind of adapter, those with the same bytes in both; the values are read and
checked each time. An adapter of which values tell more, such as copies of the base's tensors, is read in full.
"""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor

from onebase.adapters.adapter import Adapter
from onebase.adapters.fitting import Places
from onebase.errors import FormatError, OnebaseError
from onebase.storage.adapter_files import CONFIG, TENSORS, read_files, read_sidecar
from onebase.storage.format import HasModel, load_adapter, origin_of
from onebase.storage.shards import DTYPES, MAX_HEADER

_WIDENED = ("F32", "F16", "BF16")
_MOST = 64  # kinds of adapters that are remembered


class _Head(NamedTuple):
    """What tells adapters of one kind: the bytes of the config, and of the tensor file before its tensors."""

    config: bytes
    header: bytes


class _Kind(NamedTuple):
    """What was proved of a kind."""

    adapter: Adapter  # its tensors have no values
    raw: Mapping[str, Any]  # the config
    metadata: Mapping[str, str]  # the tensor file's
    start: tuple[Any, ...]  # what the sidecar had beside where the adapter came from
    dtype: torch.dtype
    order: tuple[tuple[str, str], ...]  # in the file: (module path, field)
    shapes: tuple[tuple[int, ...], ...]  # of one dimension or two


class AdapterReader:
    """Reads adapters for one base, as `load_adapter` does; their tensors are in memory of their own."""

    def __init__(self, base: HasModel) -> None:
        self._base = base
        self._places = Places(base.model)  # looked up at the start, not for the first adapter
        self._kinds: dict[_Head, _Kind] = {}

    def read(self, folder: str | Path) -> Adapter:
        """The adapter in a folder. Raises what `load_adapter` raises."""
        folder = Path(folder)
        head = _read_head(folder)
        kind = self._kind(folder, head) if head else None
        if kind is not None and head is not None:
            sidecar = read_sidecar(folder, kind.metadata)
            if _start(sidecar) == kind.start:
                return _filled(kind, folder, len(head.header), origin_of(kind.raw, sidecar, kind.metadata))
        return _copied(load_adapter(folder, self._base))

    def _kind(self, folder: Path, head: _Head) -> _Kind | None:
        kind = self._kinds.get(head)
        if kind is None and (kind := _proved(folder, head, self._base, self._places)):
            while len(self._kinds) >= _MOST:
                del self._kinds[next(iter(self._kinds))]
            self._kinds[head] = kind
        return kind


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


def _start(sidecar: Mapping[str, Any]) -> tuple[Any, ...]:
    return bool(sidecar), sidecar.get("start", ""), sidecar.get("tokens", {})


def _proved(folder: Path, head: _Head, base: HasModel, places: Places) -> _Kind | None:
    """What holds for all adapters of this one's kind; None where more than values may differ between them.

    None also where anything is wrong: the full reading says what.
    """
    try:
        outline, dtypes = _outline(head)
        files = read_files(folder, outline)
        adapter = load_adapter(files, base, known=places)
    except (OnebaseError, OSError, ValueError, KeyError, TypeError, AttributeError, RuntimeError):
        return None
    order = _order(adapter, outline)
    flat = all(tensor.ndim in (1, 2) for tensor in outline.values())
    plain = flat and len(dtypes) == 1 and dtypes.issubset(_WIDENED)
    if order is None or not plain or head != _read_head(folder):
        return None
    shapes = tuple(tuple(tensor.shape) for tensor in outline.values())
    start, dtype = _start(files.sidecar), DTYPES[dtypes.pop()]
    return _Kind(adapter, files.raw, files.metadata, start, dtype, order, shapes)


def _outline(head: _Head) -> tuple[dict[str, Tensor], set[str]]:
    """For each stored tensor one of its shape without values of its own, as they follow in the file; their dtypes.

    Raises whatever a header that is none leads to. Whether it tells the truth is for `read_files` to find.
    """
    entries: dict[str, Any] = json.loads(head.header[8:])
    entries.pop("__metadata__", None)
    ordered = sorted(entries, key=lambda name: entries[name]["data_offsets"])
    nothing = torch.zeros(1)
    outline = {name: nothing.expand(entries[name]["shape"]) for name in ordered}
    return outline, {entry["dtype"] for entry in entries.values()}


def _order(adapter: Adapter, outline: Mapping[str, Tensor]) -> tuple[tuple[str, str], ...] | None:
    """Which field each stored tensor is; None where one is none, or not as it is stored.

    Such are experts, convolutions, copies of the base's tensors, modules trained in full and token rows.
    """
    found = {
        id(tensor): (path, field)
        for path, low in adapter.lowrank.items()
        for field, tensor in low.tensors().items()
    }
    order = tuple(found[id(tensor)] for tensor in outline.values() if id(tensor) in found)
    whole = len(order) == len(found) == len(outline) and not adapter.full and not adapter.tokens
    return order if whole else None


def _filled(kind: _Kind, folder: Path, start: int, origin: Any) -> Adapter:
    """The adapter of this kind with the folder's values, which are read once, in one piece."""
    path, sizes = folder / TENSORS, [*map(math.prod, kind.shapes)]
    flat = torch.empty(sum(sizes), dtype=kind.dtype)
    data: Any = flat.view(torch.uint8).numpy()
    with path.open("rb") as file:
        file.seek(start)
        if file.readinto(data) != data.nbytes or file.read(1):
            raise FormatError(f"read {path}", f"broken or cut short ({path.stat().st_size} bytes)")
    flat = flat.float()
    if len(flat) and not all(bound.isfinite() for bound in flat.aminmax()):
        raise FormatError(f"adapter {folder} is broken", "its tensors hold NaN or infinity")
    fields: dict[str, dict[str, Tensor]] = {}
    begin = 0
    for (module, field), shape, size in zip(kind.order, kind.shapes, sizes, strict=True):
        # One call; a split and a view are three times as long.
        fields.setdefault(module, {})[field] = flat.as_strided(shape, (*shape[1:], 1), begin)
        begin += size
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
