"""Adapter <-> PEFT's folder: adapter_config.json and adapter_model.safetensors. Nothing else knows those names.

What PEFT's schema has no place for (base fingerprint, prompt format, provenance) goes into the safetensors
metadata and a sidecar, onebase.json, never into adapter_config.json: older PEFT raises on unknown keys.
"""

from __future__ import annotations

import json
from collections import defaultdict
from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple, Protocol, cast

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save
from torch import Tensor, nn

from onebase.adapter import Adapter, LowRank, Origin
from onebase.config import ALL_LINEAR
from onebase.errors import (
    BaseMismatch,
    ConfigError,
    FormatError,
    MissingFile,
    OutputExists,
    nearest,
)
from onebase.files import atomic_file, atomic_folder, write_text
from onebase.injection import base_tensors, fit_problems, with_kinds
from onebase.peft_config import from_peft, is_refused, saved_modules, target_spec, to_peft, type_problems
from onebase.targets import adaptable, match, name_matches, pattern_value, spec_matches, split_path
from onebase.variants import scaling

CONFIG, TENSORS, SIDECAR = "adapter_config.json", "adapter_model.safetensors", "onebase.json"
_PREFIX = "base_model.model."
_SIDES: dict[str, tuple[str, bool]] = {  # end of a PEFT tensor name -> (side, belongs to an embedding)
    ".lora_A.weight": ("A", False),
    ".lora_B.weight": ("B", False),
    ".lora_embedding_A": ("A", True),
    ".lora_embedding_B": ("B", True),
}
_BASE_COPY = ".base_layer.weight"  # PEFT stores an adapted embedding's own weight beside its update


def save_adapter(adapter: Adapter, folder: str | Path, overwrite: bool = False) -> Path:
    """Write an adapter folder that PEFT reads, as a whole or not at all. Raises OutputExists, OutputError."""
    target = Path(folder)
    if target.exists() and not overwrite:
        raise OutputExists(
            f"save to {target}", "it exists already", hint="choose another folder or pass overwrite=True"
        )
    with atomic_folder(target) as temporary:
        write_adapter(adapter, temporary)
    return target


def write_adapter(adapter: Adapter, folder: str | Path) -> None:
    """Write an adapter's files into a folder, each atomically, the config last."""
    folder = Path(folder)
    origin = adapter.origin
    metadata = {"format": "pt", "onebase.base": origin.base, "onebase.base_fingerprint": origin.fingerprint}
    with atomic_file(folder / TENSORS) as temporary:
        # Copies, as safetensors refuses tensors that share memory and views that are not contiguous.
        layout = torch.contiguous_format
        tensors = {n: t.clone(memory_format=layout) for n, t in _to_peft_tensors(adapter).items()}
        temporary.write_bytes(_serialised(tensors, metadata))
    sidecar = {
        "base": {"name": origin.base, "fingerprint": origin.fingerprint},
        "prompt": dict(origin.prompt),
        "training": dict(origin.training),
    }
    write_text(folder / SIDECAR, json.dumps(sidecar, indent=2) + "\n")
    write_text(folder / CONFIG, json.dumps(to_peft(adapter), indent=2, sort_keys=True) + "\n")


def _serialised(tensors: dict[str, Tensor], metadata: dict[str, str]) -> bytes:
    """A safetensors file, the same bytes each time: the library writes its metadata in random order."""
    data = save(tensors, metadata)
    start = 8 + int.from_bytes(data[:8], "little")
    header = json.loads(data[8:start])
    ordered = {"__metadata__": dict(sorted(metadata.items()))} | {
        n: v for n, v in header.items() if n != "__metadata__"
    }
    text = json.dumps(ordered, separators=(",", ":"), ensure_ascii=False).encode()
    text += b" " * (-len(text) % 8)
    return len(text).to_bytes(8, "little") + text + data[start:]


def _to_peft_tensors(adapter: Adapter) -> dict[str, Tensor]:
    names = {(side, embedding): end for end, (side, embedding) in _SIDES.items()}
    tensors: dict[str, Tensor] = {}
    for path, low in adapter.lowrank.items():
        for side, tensor in (("A", low.A), ("B", low.B)):
            tensors[_PREFIX + path + names[side, low.kind == "embedding"]] = tensor
    for path, state in adapter.full.items():
        tensors |= {f"{_PREFIX}{path}.{name}": tensor for name, tensor in state.items()}
    return tensors


class HasModel(Protocol):
    """What loading needs of a base: its model, and the digest of its stored tensors (empty if unknown)."""

    @property
    def model(self) -> nn.Module: ...
    @property
    def fingerprint(self) -> str: ...


class Stored(NamedTuple):
    """An adapter folder as read: the adapter, PEFT's config as it stands, and copies of base tensors in it."""

    adapter: Adapter
    raw: Mapping[str, Any]
    base_copies: Mapping[str, Tensor]


def load_adapter(folder: str | Path, base: HasModel, allow_base_mismatch: bool = False) -> Adapter:
    """Read an adapter and prove that it belongs to this base.

    Every tensor that the config promises for this model must be there, none besides, each of the right shape;
    a recorded fingerprint must be the base's. Raises BaseMismatch that lists all problems at once, FormatError
    where the folder itself is broken. `allow_base_mismatch` lets another fingerprint pass, nothing else.
    """
    stored = read_stored(folder)
    adapter, problems = stored.adapter, [*fit_problems(base.model, stored.adapter)]
    wanted, given = _expected(base.model, stored.raw, stored.adapter), set(adapter.lowrank)
    problems += [
        f"{path}: missing: the config targets it, the file has no tensors for it" for path in wanted - given
    ]
    problems += [
        f"{path}: unexpected: the file has tensors, the config does not target it" for path in given - wanted
    ]
    own = dict(base_tensors(base.model)) if stored.base_copies else {}
    problems += [
        f"{name}: the adapter carries this base tensor, and it is not the base's"
        for name, tensor in stored.base_copies.items()
        if name in own and not _same(tensor, own[name])
    ]
    theirs = adapter.origin.fingerprint
    if theirs and base.fingerprint and theirs != base.fingerprint and not allow_base_mismatch:
        problems.append(
            f"made for base {adapter.origin.base} with fingerprint {theirs}, this base has {base.fingerprint} "
            "(--allow-base-mismatch to go on)"
        )
    if problems:
        raise BaseMismatch(f"adapter {folder} does not fit this base", "\n  " + "\n  ".join(sorted(problems)))
    return with_kinds(base.model, adapter)


def _same(copy: Tensor, own: Tensor) -> bool:
    """Equal at the coarser of the two dtypes: PEFT stores the copy in the dtype that the base was loaded in."""
    coarse = min((copy.dtype, own.dtype), key=lambda dtype: torch.finfo(dtype).bits)
    return copy.shape == own.shape and torch.equal(copy.to(coarse), own.to(coarse).cpu())


def _expected(model: nn.Module, raw: Mapping[str, Any], adapter: Adapter) -> set[str]:
    """The modules that PEFT would adapt for this config."""
    spec = target_spec(raw)
    if spec.targets == ALL_LINEAR:
        return {target.path for target in match(model, adapter.config).targets}
    full = tuple(path + "." for path in adapter.full)
    return {
        path
        for path in adaptable(model)
        if spec_matches(spec.targets, path)
        and not (spec.excluded and spec_matches(spec.excluded, path))
        and (not spec.layers or split_path(path)[1] in spec.layers)
        and not (path + ".").startswith(full)
    }


def read_adapter(folder: str | Path) -> Adapter:
    """Read an adapter folder without a base; only `load_adapter` can tell whether it fits one."""
    return read_stored(folder).adapter


def read_stored(folder: str | Path) -> Stored:
    """Read a folder that onebase or PEFT wrote. Raises MissingFile, or FormatError that lists every problem.

    Factors are widened to float32, which is exact. Nothing is unpickled.
    """
    folder = Path(folder)
    raw = _read_config(folder)
    tensors, metadata = _read_tensors(folder)
    sidecar = _read_sidecar(folder, metadata)
    odd_types = [f"{n}: dtype {t.dtype}, not exact in float32" for n, t in tensors.items() if not _widens(t)]
    if odd_types:
        raise _broken(folder, odd_types)
    problems = _tensor_problems(tensors)
    lows, full, copies, odd = _sort_tensors(tensors, saved_modules(raw))
    problems += odd
    if not lows and not full:
        problems.append("it holds no adapter tensor at all")
        raise _broken(folder, problems)
    try:
        config = from_peft(raw, sorted(lows))
    except ConfigError as error:
        raise FormatError(f"read {folder / CONFIG}", str(error)) from error
    lowrank: dict[str, LowRank] = {}
    for path, sides in lows.items():
        rank, alpha = (
            pattern_value(config.ranks, path, config.rank),
            pattern_value(config.alphas, path, config.alpha),
        )
        a, b = sides.get("A"), sides.get("B")
        if a is None or b is None:
            problems.append(f"{path}: lora_{'A' if a is None else 'B'} is missing")
        elif a.ndim != 2 or b.ndim != 2 or not a.shape[0] == b.shape[1] == rank:
            problems.append(
                f"{path}: A {tuple(a.shape)}, B {tuple(b.shape)}, but the config says rank {rank}"
            )
        else:
            kind = (
                "embedding"
                if "embedding" in sides
                else "transposed"
                if raw.get("fan_in_fan_out")
                else "linear"
            )
            lowrank[path] = LowRank(a, b, scaling(rank, alpha, config.rslora), kind)
    if problems:
        raise _broken(folder, problems)
    return Stored(Adapter(config, lowrank, full, _origin(raw, sidecar, metadata)), raw, copies)


def _broken(folder: Path, problems: list[str]) -> FormatError:
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
        hint = "these settings change what the adapter computes; loading it as plain LoRA would be silently wrong"
        raise FormatError(
            f"adapter {folder} uses settings that onebase does not compute", ", ".join(unknown), hint=hint
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
    try:
        value = json.loads(path.read_text(encoding="utf-8"))
    except (ValueError, OSError, RecursionError) as error:
        raise FormatError(f"read {path}", f"not JSON: {error}") from error
    if not isinstance(value, dict):
        raise FormatError(f"read {path}", f"a JSON object was expected, found {type(value).__name__}")
    return cast("dict[str, Any]", value)


def _read_tensors(folder: Path) -> tuple[dict[str, Tensor], dict[str, str]]:
    path = folder / TENSORS
    if not path.is_file():
        pickles = [p.name for p in folder.iterdir() if p.suffix in (".bin", ".pt", ".pth", ".pkl", ".ckpt")]
        found = f"only {pickles[0]}, a pickle, which onebase never loads" if pickles else "no such file"
        raise FormatError(f"read {path}", found, hint="save the adapter as safetensors with its maker")
    try:
        with safe_open(str(path), "pt") as file:
            return {key: file.get_tensor(key) for key in file.keys()}, dict(file.metadata() or {})  # noqa: SIM118
    except (SafetensorError, OSError, ValueError) as error:
        # Only a file that is no safetensors is called a pickle: a header of 640 bytes starts like one.
        with path.open("rb") as file:
            pickled = file.read(4).startswith((b"PK\x03\x04", b"\x80"))
        found = f"broken or cut short ({path.stat().st_size} bytes): {error}"
        if pickled:
            found = "a pickle under a safetensors name, which onebase never loads"
        raise FormatError(f"read {path}", found) from error


def _read_sidecar(folder: Path, metadata: Mapping[str, str]) -> dict[str, Any]:
    if not (folder / SIDECAR).is_file():
        return {}
    sidecar = _read_json(folder / SIDECAR)
    odd = [name for name in ("base", "prompt", "training") if not isinstance(sidecar.get(name, {}), dict)]
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


def _widens(tensor: Tensor) -> bool:
    return tensor.is_floating_point() and tensor.itemsize <= 4


def _tensor_problems(tensors: Mapping[str, Tensor]) -> list[str]:
    return [f"{name}: holds NaN or infinity" for name, t in tensors.items() if not t.float().isfinite().all()]


def _sort_tensors(
    tensors: Mapping[str, Tensor], saved: tuple[str, ...]
) -> tuple[dict[str, dict[str, Tensor]], dict[str, dict[str, Tensor]], dict[str, Tensor], list[str]]:
    """PEFT's flat names as (sides of each update, modules trained in full, copies of base tensors, odd names)."""
    lows: dict[str, dict[str, Tensor]] = defaultdict(dict)
    full: dict[str, dict[str, Tensor]] = defaultdict(dict)
    copies: dict[str, Tensor] = {}
    odd: list[str] = []
    for key, tensor in tensors.items():
        name, wide = key.removeprefix(_PREFIX), tensor.to(torch.float32)
        end = next((end for end in _SIDES if name.endswith(end)), None)
        path = _saved_path(name, saved)
        if not key.startswith(_PREFIX):
            odd.append(f"{key}: unexpected name")
        elif end is not None:
            side, embedding = _SIDES[end]
            lows[name.removesuffix(end)][side] = wide
            if embedding:
                lows[name.removesuffix(end)]["embedding"] = wide
        elif path:
            full[path][name.removeprefix(path + ".")] = wide
        elif name.endswith(_BASE_COPY):
            copies[name.removesuffix(_BASE_COPY) + ".weight"] = tensor
        elif name.endswith(("embed_tokens.weight", "lm_head.weight", "wte.weight", "word_embeddings.weight")):
            copies[name] = tensor  # PEFT adds these whenever it suspects a resized vocabulary
        else:
            odd.append(f"{key}: unexpected name")
    return dict(lows), dict(full), copies, odd


def _saved_path(name: str, saved: tuple[str, ...]) -> str:
    """The path of the fully trained module that a tensor belongs to, empty if none."""
    parts = name.split(".")
    paths = (".".join(parts[:end]) for end in range(1, len(parts)))
    return next((path for path in paths if any(name_matches(one, path) for one in saved)), "")


def _origin(raw: Mapping[str, Any], sidecar: Mapping[str, Any], metadata: Mapping[str, str]) -> Origin:
    return Origin(
        base=raw.get("base_model_name_or_path") or "",
        fingerprint=metadata.get("onebase.base_fingerprint", ""),
        task=raw.get("task_type") or "",
        prompt=sidecar.get("prompt", {}),
        training=sidecar.get("training", {}),
    )
