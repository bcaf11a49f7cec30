"""A digest of a base's weights: which base an adapter belongs to, and the proof that training left it alone.

One line per tensor, `name dtype [shape] sha256(bytes)`; the lines are sorted and hashed. How the tensors are
spread over files does not matter.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import time
from collections.abc import Callable, Generator, Iterable, Mapping
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from onebase.files import write_text
from onebase.models.builtin import cache_home
from onebase.shards import DTYPE_NAMES, TensorInfo, list_tensors, tensor_bytes

Rename = Callable[[str], str | None]

# A file written less than this ago may change again without its time stamp moving, as git knows ("racy git").
_SETTLED_NS = 1_000_000_000


def fingerprint_files(folder: str | Path) -> str:
    """`sha256:...` of the stored tensors of a checkpoint folder or file; remembered by file identity.

    Raises FormatError or MissingFile as `list_tensors` does.
    """
    infos = list_tensors(folder)
    files = sorted({info.file for info in infos})
    return remembered("fingerprint", files, lambda: combined(_map_digests(_stored_digest, infos)))


def fingerprint_model(model: nn.Module, rename: Rename | None = None) -> str:
    """The same digest over a model's parameters and persistent buffers; tied ones count once, by their first name.

    `rename` gives a tensor's name in the base, or None to leave it out.
    """
    return fingerprint_tensors(model_tensors(model, rename))


def fingerprint_tensors(named: Iterable[tuple[str, Tensor]]) -> str:
    """The same digest over any named tensors."""
    return combined(tensor_digests(named))


def tensor_digests(named: Iterable[tuple[str, Tensor]]) -> dict[str, str]:
    """Name -> `dtype [shape] hex` of each tensor, so that a difference can be named."""
    return _map_digests(_memory_digest, named)


def model_tensors(model: nn.Module, rename: Rename | None = None) -> Generator[tuple[str, Tensor]]:
    """A model's parameters and persistent buffers under their names in the base; each tied tensor once."""
    seen: set[int] = set()
    for name, tensor in model.state_dict(keep_vars=True).items():
        known = rename(name) if rename else name
        if known is not None and id(tensor) not in seen:
            seen.add(id(tensor))
            yield known, tensor


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


def _map_digests(digest: Callable[[Any], tuple[str, str]], items: Iterable[Any]) -> dict[str, str]:
    with ThreadPoolExecutor() as pool:  # hashlib releases the interpreter's lock
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
