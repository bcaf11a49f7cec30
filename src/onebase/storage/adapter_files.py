"""An adapter folder's three files, read as they are: whatever is in them gives values or a clear error."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple, cast

from safetensors import SafetensorError, safe_open
from torch import Tensor

from onebase.errors import FormatError, MissingFile, nearest
from onebase.options import fits
from onebase.storage.peft_config import is_refused, refusal_hint, type_problems
from onebase.storage.peft_tensors import widens

MAX_JSON = 100_000_000  # bytes; as many as safetensors allows its headers
CONFIG, TENSORS, SIDECAR = "adapter_config.json", "adapter_model.safetensors", "onebase.json"


class Files(NamedTuple):
    """An adapter folder's files, each for itself: PEFT's config, the tensors and their metadata, our sidecar."""

    folder: Path
    raw: Mapping[str, Any]
    tensors: Mapping[str, Tensor]
    metadata: Mapping[str, str]
    sidecar: Mapping[str, Any]
    problems: Sequence[str]  # a sentence for each tensor that is not finite, to be told with all others


def read_files(folder: str | Path, outline: Mapping[str, Tensor] | None = None) -> Files:
    """The files of a folder that onebase or PEFT wrote, each for itself. Nothing is unpickled.

    An `outline` is what the caller has read of the tensor file's header, a tensor of the right shape for each: the
    file is then checked to be whole, and its values are not read.
    Raises MissingFile, or FormatError where a file is broken, or a tensor's dtype not exact in float32.
    """
    folder = Path(folder)
    raw = _read_config(folder)
    tensors, metadata = _read_tensors(folder, outline)
    own = tensors if outline is None else {}
    if odd_types := [f"{n}: dtype {t.dtype}, not exact in float32" for n, t in own.items() if not widens(t)]:
        raise broken(folder, odd_types)
    problems = _tensor_problems(own)
    return Files(folder, raw, tensors, metadata, read_sidecar(folder, metadata), problems)


def broken(folder: Path, problems: list[str]) -> FormatError:
    """The error that lists all of a folder's problems."""
    return FormatError(f"adapter {folder} is broken", "\n  " + "\n  ".join(problems))


def _read_config(folder: Path) -> dict[str, Any]:
    if not folder.is_dir():
        near = (
            nearest(folder.name, (p.name for p in folder.parent.iterdir())) if folder.parent.is_dir() else []
        )
        raise MissingFile(f"adapter {folder}", "no such folder", near)
    raw = _read_json(folder / CONFIG)
    unknown = [f"{key}={value!r}" for key, value in raw.items() if is_refused(key, value)]
    if unknown:
        asked = f"adapter {folder} uses settings that onebase does not compute"
        raise FormatError(
            asked, ", ".join(unknown), hint=refusal_hint([text.partition("=")[0] for text in unknown])
        )
    if problems := type_problems(raw):
        raise FormatError(f"read {folder / CONFIG}", "; ".join(problems))
    return raw


def _read_json(path: Path) -> dict[str, Any]:
    if not path.is_file():
        found = "no such file; the folder holds " + (
            ", ".join(sorted(p.name for p in path.parent.iterdir())) or "nothing"
        )
        raise MissingFile(f"read {path}", found)
    if (size := path.stat().st_size) > MAX_JSON:
        raise FormatError(f"read {path}", f"{size} bytes, at most {MAX_JSON} are read")
    try:
        value = json.loads(path.read_text(encoding="utf-8"))
        json.dumps(value, ensure_ascii=False).encode()  # half a surrogate pair could not be printed or stored
    except (ValueError, OSError, RecursionError) as error:
        raise FormatError(f"read {path}", f"not JSON: {error}") from error
    if not isinstance(value, dict):
        raise FormatError(f"read {path}", f"a JSON object was expected, found {type(value).__name__}")
    return cast("dict[str, Any]", value)


def _read_tensors(
    folder: Path, outline: Mapping[str, Tensor] | None
) -> tuple[dict[str, Tensor], dict[str, str]]:
    path = folder / TENSORS
    if not path.is_file():
        pickles = [p.name for p in folder.iterdir() if p.suffix in (".bin", ".pt", ".pth", ".pkl", ".ckpt")]
        found = f"only {pickles[0]}, a pickle, which onebase never loads" if pickles else "no such file"
        raise FormatError(f"read {path}", found, hint="save the adapter as safetensors with its maker")
    try:
        with safe_open(str(path), "pt") as file:
            metadata = dict(file.metadata() or {})
            if outline is not None:
                return {name: outline[name] for name in sorted(outline)}, metadata
            return {key: file.get_tensor(key) for key in file.keys()}, metadata  # noqa: SIM118
    except (SafetensorError, OSError, ValueError) as error:
        # Only a file that is no safetensors is called a pickle: a header of 640 bytes starts like one.
        with path.open("rb") as file:
            pickled = file.read(4).startswith((b"PK\x03\x04", b"\x80"))
        found = f"broken or cut short ({path.stat().st_size} bytes): {error}"
        if pickled:
            found = "a pickle under a safetensors name, which onebase never loads"
        raise FormatError(f"read {path}", found) from error


def read_sidecar(folder: Path, metadata: Mapping[str, str]) -> dict[str, Any]:
    """onebase.json, {} where there is none; `metadata` is the tensor file's. Raises FormatError."""
    if not (folder / SIDECAR).is_file():
        return {}
    sidecar = _read_json(folder / SIDECAR)
    odd = [
        name for name in ("base", "prompt", "training", "head") if not isinstance(sidecar.get(name, {}), dict)
    ]
    if not fits(dict[str, int], sidecar.get("tokens", {})):
        raise FormatError(f"read {folder / SIDECAR}", "tokens must be texts with their ids")
    if not isinstance(sidecar.get("start", ""), str):
        raise FormatError(f"read {folder / SIDECAR}", "start must be a text")
    if odd:
        raise FormatError(f"read {folder / SIDECAR}", f"must be objects: {', '.join(odd)}")
    recorded, inside = (
        sidecar.get("base", {}).get("fingerprint", ""),
        metadata.get("onebase.base_fingerprint", ""),
    )
    if recorded != inside:
        found = f"it says fingerprint {recorded or 'none'}, {TENSORS} says {inside or 'none'}"
        raise FormatError(f"read {folder / SIDECAR}", found, hint="the two files are from different adapters")
    return sidecar


def _tensor_problems(tensors: Mapping[str, Tensor]) -> list[str]:
    return [f"{name}: holds NaN or infinity" for name, t in tensors.items() if not _is_finite(t.float())]


def _is_finite(values: Tensor) -> bool:
    """Whether all are. A finite sum proves it, in a third of the time; one that overflows proves nothing."""
    return bool(values.sum().isfinite() or values.isfinite().all())
