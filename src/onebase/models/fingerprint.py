"""A digest of a base's weights: which base an adapter belongs to, and the proof that training left it alone.

One line per tensor, `name dtype [shape] sha256(bytes)`; the lines are sorted and hashed. How the tensors are
spread over files does not matter.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import time
from collections.abc import Callable, Iterable, Mapping
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from onebase.adapters.injection import base_tensors
from onebase.files import cache_home, write_text
from onebase.storage.shards import DTYPE_NAMES, TensorInfo, list_tensors, tensor_bytes

# A file written less than this ago may change again without its time stamp moving, as git knows ("racy git").
_SETTLED_NS = 1_000_000_000


def fingerprint_files(folder: str | Path) -> str:
    """`sha256:...` of the stored tensors of a checkpoint folder or file; remembered by file identity.

    Raises FormatError or MissingFile as `list_tensors` does.
    """
    infos = list_tensors(folder)
    files = sorted({info.file for info in infos})
    return remembered("fingerprint", files, lambda: combined(_map_digests(_stored_digest, infos)))


def fingerprint_model(model: nn.Module) -> str:
    """The same digest over a model's own tensors, adapters or not; tied ones count once, by their first name."""
    return fingerprint_tensors(base_tensors(model))


def fingerprint_tensors(named: Iterable[tuple[str, Tensor]]) -> str:
    """The same digest over any named tensors."""
    return combined(tensor_digests(named))


def tensor_digests(named: Iterable[tuple[str, Tensor]], threads: int | None = None) -> dict[str, str]:
    """Name -> `dtype [shape] hex` of each tensor, so that a difference can be named; on all cores, or so many."""
    return _map_digests(_memory_digest, named, threads)


def remembered(kind: str, files: Iterable[Path], compute: Callable[[], str]) -> str:
    """`compute()`, or what it gave for these very files before: same paths, sizes, times and inodes."""
    stats = [(file.resolve(), file.stat()) for file in files]
    identity = [[str(path), stat.st_size, stat.st_mtime_ns, stat.st_ino] for path, stat in stats]
    key = hashlib.sha256(json.dumps([kind, *(str(path) for path, _ in stats)]).encode()).hexdigest()
    entry = cache_home() / "digests" / f"{key[:32]}.json"
    with contextlib.suppress(OSError, ValueError):  # absent or broken: computed anew
        match json.loads(entry.read_text(encoding="utf-8")):
            case {"identity": known, "digest": str(digest)} if known == identity:
                return digest
            case _:
                pass
    digest = compute()
    if time.time_ns() - max(stat.st_mtime_ns for _, stat in stats) > _SETTLED_NS:
        with contextlib.suppress(OSError):  # a cache that cannot be written costs time, nothing else
            write_text(entry, json.dumps({"identity": identity, "digest": digest}))
    return digest


def _map_digests(
    digest: Callable[[Any], tuple[str, str]], items: Iterable[Any], threads: int | None = None
) -> dict[str, str]:
    with ThreadPoolExecutor(threads) as pool:  # hashlib releases the interpreter's lock
        return dict(pool.map(digest, items))


def _stored_digest(info: TensorInfo) -> tuple[str, str]:
    return info.name, _digest(info.dtype, info.shape, tensor_bytes(info))


def _memory_digest(named: tuple[str, Tensor]) -> tuple[str, str]:
    name, tensor = named
    flat = tensor.detach().cpu().contiguous().reshape(-1)
    # numpy has no bfloat16, so every dtype is read as bytes.
    return name, _digest(DTYPE_NAMES[tensor.dtype], tuple(tensor.shape), flat.view(torch.uint8).numpy().data)


def _digest(dtype: str, shape: tuple[int, ...], data: memoryview) -> str:
    return f"{dtype} [{','.join(map(str, shape))}] {hashlib.sha256(data).hexdigest()}"


def combined(digests: Mapping[str, str]) -> str:
    """One digest over what `tensor_digests` gave."""
    lines = "".join(f"{name} {digest}\n" for name, digest in sorted(digests.items()))
    return f"sha256:{hashlib.sha256(lines.encode()).hexdigest()}"
