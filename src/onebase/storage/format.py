"""Adapter <-> PEFT's folder: adapter_config.json and adapter_model.safetensors. Nothing else knows those names.

What PEFT's schema has no place for (base fingerprint, prompt format, provenance) goes into the safetensors
metadata and a sidecar, onebase.json, never into adapter_config.json: older PEFT raises on unknown keys.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any, NamedTuple, Protocol

import torch
from safetensors.torch import save
from torch import Tensor, nn

from onebase.adapters.adapter import HEAD_TASK, VECTOR_TASK, Adapter, Origin
from onebase.adapters.fitting import Places, fit_problems, places_of, with_kinds
from onebase.adapters.layers import base_modules
from onebase.adapters.targets import match, name_matches, parameter_sites, spec_matches, split_path
from onebase.config import ALL_LINEAR
from onebase.errors import (
    BaseMismatch,
    ConfigError,
    FormatError,
    OutputExists,
)
from onebase.files import atomic_file, atomic_folder, write_text
from onebase.storage.adapter_files import CONFIG, SIDECAR, TENSORS, Files, broken, read_files
from onebase.storage.peft_biases import with_biases
from onebase.storage.peft_config import (
    from_peft,
    holds_biases,
    names_start,
    saved_modules,
    target_spec,
    to_peft,
)
from onebase.storage.peft_experts import stacked_experts
from onebase.storage.peft_tensors import (
    comes_last,
    lowrank_updates,
    places,
    sort_tensors,
    target_names,
    to_peft_tensors,
    without_idle,
)
from onebase.storage.peft_tokens import missing_rows, take_rows, to_peft_rows


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
    stored = to_peft_tensors(adapter) | to_peft_rows(adapter)
    with atomic_file(folder / TENSORS) as temporary:
        # Copies, as safetensors refuses tensors that share memory and views that are not contiguous.
        layout = torch.contiguous_format
        tensors = {n: t.clone(memory_format=layout) for n, t in stored.items()}
        temporary.write_bytes(_serialised(tensors, metadata))
    sidecar = {
        "base": {"name": origin.base, "fingerprint": origin.fingerprint},
        "prompt": dict(origin.prompt),
        "training": dict(origin.training),
    } | ({} if names_start(adapter.config) else {"start": adapter.config.init})
    sidecar |= {"tokens": dict(origin.tokens)} if origin.tokens else {}
    sidecar |= {"head": dict(origin.head)} if origin.head else {}
    write_text(folder / SIDECAR, json.dumps(sidecar, indent=2) + "\n")
    # In order, but for what stands inside: of rank_pattern's keys the first one that matches counts.
    settings = dict(sorted(to_peft(adapter).items()))
    write_text(folder / CONFIG, json.dumps(settings, indent=2) + "\n")


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


class HasModel(Protocol):
    """What loading needs of a base: its model, and the digest of its stored tensors (empty if unknown)."""

    def for_adapter(self, adapter: Adapter) -> HasModel:
        """The base with the head that the adapter was trained with, where it has one, or without its own."""
        ...

    @property
    def model(self) -> nn.Module: ...
    @property
    def fingerprint(self) -> str: ...


class Stored(NamedTuple):
    """An adapter folder as read: the adapter, PEFT's config as it stands, and copies of base tensors in it."""

    adapter: Adapter
    raw: Mapping[str, Any]
    base_copies: Mapping[str, Tensor]


def load_adapter(
    folder: str | Path | Files,
    base: HasModel,
    allow_base_mismatch: bool = False,
    known: Places | None = None,
) -> Adapter:
    """Read an adapter and prove that it belongs to this base.

    Every tensor that the config promises for this model must be there, none besides, each of the right shape;
    a recorded fingerprint must be the base's. Raises BaseMismatch that lists all problems at once, FormatError
    where the folder itself is broken. `allow_base_mismatch` lets another fingerprint pass, nothing else.
    `known`: the base's places, where they have been looked up.
    """
    files = folder if isinstance(folder, Files) else read_files(folder)
    if files.raw.get("task_type") in (HEAD_TASK, VECTOR_TASK):
        base, known = base.for_adapter(read_stored(files).adapter), None
    places = known or Places(base.model)
    stored = read_stored(files, places)
    adapter, problems = _with_added_tokens(stored, base.model), list[str]()
    problems += fit_problems(places, adapter)
    wanted, given = _expected(places, stored.raw, stored.adapter), set(adapter.lowrank)
    problems += [
        f"{path}: missing: the config targets it, the file has no tensors for it" for path in wanted - given
    ]
    problems += [
        f"{path}: unexpected: the file has tensors, the config does not target it" for path in given - wanted
    ]
    problems += missing_rows(places.modules, stored.raw, adapter.tokens)
    own = _weights(base.model) if stored.base_copies else {}
    problems += [
        f"{name}: the adapter carries this base tensor, and it is not the base's"
        for name, tensor in stored.base_copies.items()
        if name in own and name.removesuffix(".weight") not in adapter.full and not _same(tensor, own[name])
    ]
    theirs = adapter.origin.fingerprint
    if theirs and base.fingerprint and theirs != base.fingerprint and not allow_base_mismatch:
        problems.append(
            f"made for base {adapter.origin.base} with fingerprint {theirs}, this base has {base.fingerprint} "
            "(--allow-base-mismatch to go on)"
        )
    if problems:
        raise BaseMismatch(
            f"adapter {files.folder} does not fit this base", "\n  " + "\n  ".join(sorted(problems))
        )
    return with_kinds(places, adapter)


def _weights(model: nn.Module) -> dict[str, Tensor]:
    """Every weight by its full name, a tied one by each."""
    found = {f"{path}.weight": getattr(m, "weight", None) for path, m in base_modules(model)}
    return {name: weight for name, weight in found.items() if isinstance(weight, Tensor)}


def _with_added_tokens(stored: Stored, model: nn.Module) -> Adapter:
    """The adapter with the embeddings that have more rows than the base's as modules trained in full.

    PEFT stores an embedding and a head whole where tokens were added to the vocabulary; a tied one comes once.
    """
    own = _weights(model) if stored.base_copies else {}
    grown: dict[str, Tensor] = {}
    for name, tensor in stored.base_copies.items():
        if name in own and tensor.shape[1:] == own[name].shape[1:] and len(tensor) > len(own[name]):
            tied = [n for n, weight in own.items() if weight is own[name]]
            grown |= {n.removesuffix(".weight"): tensor for n in tied if n not in grown}
    adapter = stored.adapter
    saved = (*adapter.config.modules_to_save, *(path for path in grown if path not in adapter.full))
    full = {path: {"weight": tensor.float()} for path, tensor in grown.items()} | dict(adapter.full)
    return replace(adapter, config=replace(adapter.config, modules_to_save=saved), full=full)


def _same(copy: Tensor, own: Tensor) -> bool:
    """Equal at the coarser of the two dtypes: PEFT stores the copy in the dtype that the base was loaded in."""
    coarse = min((copy.dtype, own.dtype), key=lambda dtype: torch.finfo(dtype).bits)
    return copy.shape == own.shape and torch.equal(copy.to(coarse), own.detach().to(coarse).cpu())


def _expected(places: Places, raw: Mapping[str, Any], adapter: Adapter) -> set[str]:
    """The modules that PEFT would adapt for this config."""
    spec = target_spec(raw)
    if spec.targets == ALL_LINEAR:
        undropped = replace(adapter.config, dropout=0.0)
        return {target.path for target in match(places.model, undropped).targets}
    full = tuple(path + "." for path in adapter.full)
    found = {
        path
        for path, site in places.adaptable.items()
        if any(spec_matches(spec.targets, one) for one in {path, site.owner})
        and not (spec.excluded and any(spec_matches(spec.excluded, one) for one in {path, site.owner}))
        and (not spec.layers or split_path(path)[1] in spec.layers)
    }
    named = parameter_sites(places.modules, spec.parameters)
    return {path for path in (*found, *named) if not (path + ".").startswith(full)}


def read_adapter(folder: str | Path) -> Adapter:
    """Read an adapter folder without a base; only `load_adapter` can tell whether it fits one.

    Raises FormatError also for PEFT's bias="lora_only" and "all", whose biases mean nothing without the base's.
    """
    stored = read_stored(folder)
    if holds_biases(stored.raw) and any(name.endswith(".bias") for name in stored.base_copies):
        found = (
            f"it stores trained biases whole (bias={stored.raw['bias']!r}), so the base is needed to tell what "
            "was added"
        )
        hint = f"rewrite it once with its base: onebase export {folder} --to peft --base BASE --output NEW"
        raise FormatError(f"read {folder}", found, hint=hint)
    return stored.adapter


def read_stored(folder: str | Path | Files, model: nn.Module | Places | None = None) -> Stored:
    """What the files of an adapter mean. Raises as `read_files`, or FormatError that lists every problem.

    Factors are widened to float32, which is exact. The base's model, where it is known, tells which parameters a
    stored update belongs to; else the order in the config does.
    """
    files = folder if isinstance(folder, Files) else read_files(folder)
    folder, raw, tensors, metadata, sidecar, problems = files
    modules = places_of(model).modules if model is not None else None
    rows = take_rows(tensors, raw)
    parts = sort_tensors(rows.others, saved_modules(raw), holds_biases(raw))
    problems = [*problems, *parts.odd, *rows.problems]
    if not parts.lows and not parts.full and not rows.tokens:
        problems.append("it holds no adapter tensor at all")
        raise broken(folder, problems)
    lows: Mapping[str, Mapping[str, Tensor]] = parts.lows
    if modules is not None:
        lows, raw, misfits = stacked_experts(without_idle(lows, modules), raw, modules)
        if misfits:
            raise broken(folder, [*problems, *misfits])
    raw = {**raw, **_ordered_parameters(raw, sidecar, modules)}
    try:
        at = places([*lows], target_spec(raw), modules, ordered=bool(sidecar))
        config = from_peft(raw, sorted(target_names(at)), sidecar.get("start", ""))
    except ConfigError as error:
        raise FormatError(f"read {folder / CONFIG}", str(error)) from error
    lowrank, misfits = lowrank_updates(lows, at, config, raw)
    problems += misfits
    adapter = Adapter(config, lowrank, parts.full, origin_of(raw, sidecar, metadata), rows.tokens)
    if modules is not None and holds_biases(raw):
        adapter, misfits = with_biases(adapter, parts.copies, modules)
        problems += misfits
        if adapter.lowrank.keys() != lowrank.keys():
            targets = list(adapter.config.target_modules)
            raw = raw | {"target_modules": targets, "exclude_modules": None, "layers_to_transform": None}
    if problems:
        raise broken(folder, problems)
    return Stored(adapter, raw, parts.copies)


def _ordered_parameters(
    raw: Mapping[str, Any], sidecar: Mapping[str, Any], modules: Mapping[str, nn.Module] | None
) -> dict[str, Any]:
    """`target_parameters` in the order in which their modules register them, which PEFT does not keep and onebase does.

    Without the base it is known of transformers' experts, whose projection down comes last.
    """
    listed: list[str] = raw.get("target_parameters") or []
    if modules is not None:
        found = [*parameter_sites(modules, listed)]
        key = {name: next((n for n, f in enumerate(found) if name_matches(name, f)), 0) for name in listed}
        listed = sorted(listed, key=key.__getitem__)
    elif not sidecar:
        listed = sorted(listed, key=comes_last)
    return {"target_parameters": listed} if listed else {}


def origin_of(raw: Mapping[str, Any], sidecar: Mapping[str, Any], metadata: Mapping[str, str]) -> Origin:
    """Where an adapter came from, by its three files."""
    return Origin(
        base=raw.get("base_model_name_or_path") or "",
        fingerprint=metadata.get("onebase.base_fingerprint", ""),
        task=raw.get("task_type") or "",
        prompt=sidecar.get("prompt", {}),
        training=sidecar.get("training", {}),
        tokens=sidecar.get("tokens", {}),
        head=sidecar.get("head", {}),
    )
