"""What can be read of an adapter folder, broken or not: each part for itself, headers first, nothing unpickled."""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, NamedTuple, cast

from torch import Tensor

from onebase.adapters.adapter import LowRank
from onebase.adapters.targets import pattern_value
from onebase.adapters.variants import scaling
from onebase.diagnosis.names import PREFIX, repair
from onebase.errors import ConfigError, MissingFile, OnebaseError, nearest
from onebase.options import fits, require_pattern
from onebase.storage.adapter_files import CONFIG, SIDECAR, TENSORS
from onebase.storage.format import HasModel, Stored, load_adapter, read_stored
from onebase.storage.shards import TensorInfo, list_tensors, read_tensor

PICKLES = (".bin", ".pt", ".pth", ".pkl", ".ckpt")
_PEFT_DEFAULTS: dict[str, Any] = {"r": 8, "lora_alpha": 8}  # what PEFT takes where a config does not say
_FACTOR = re.compile(r"(?P<path>.+)\.lora_(?P<embedding>embedding_)?(?P<side>[AB])(?:\.weight)?")


class Fault(NamedTuple):
    """Something about the files that keeps the adapter from being used."""

    found: str
    advice: str


@dataclass(frozen=True)
class Salvage:
    """An adapter folder as far as it can be read."""

    folder: Path
    raw: Mapping[str, Any] = field(default_factory=dict[str, Any])  # adapter_config.json as it stands
    infos: tuple[TensorInfo, ...] = ()  # the file's tensors under the file's names
    faults: tuple[Fault, ...] = ()
    wrong_names: Mapping[str, list[str]] = field(default_factory=dict[str, list[str]])
    stored: Stored | None = None  # what the reader makes of it; None where it refuses the folder
    refusal: str = ""  # why it does
    misfit: str = ""  # why it does not load onto the base, whatever the fingerprints
    template: str = ""  # the chat template that lies beside the adapter
    # Each token's id in the tokenizer that lies beside it.
    vocabulary: Mapping[str, int] = field(default_factory=dict[str, int])
    lows: Mapping[str, LowRank] = field(
        default_factory=dict[str, LowRank]
    )  # the updates, also where it refuses
    tensors: Mapping[str, Tensor] = field(default_factory=dict[str, Tensor])  # the file's, where it refuses


def salvage(folder: str | Path, base: HasModel | None = None) -> Salvage:
    """Read a folder, and try it on the base, without giving up at what is wrong with it.

    Raises MissingFile where there is no such folder.
    """
    folder = Path(folder)
    if not folder.is_dir():
        beside = [p.name for p in folder.parent.iterdir()] if folder.parent.is_dir() else []
        raise MissingFile(f"adapter {folder}", "no such folder", nearest(folder.name, beside))
    faults: list[Fault] = []
    raw = _json(folder / CONFIG, True, faults)
    _json(folder / SIDECAR, False, faults)
    infos = _infos(folder, faults)
    fixed = repair(info.name for info in infos)
    template, vocabulary = _template(folder), _vocabulary(folder)
    read = Salvage(folder, raw, infos, tuple(faults), fixed.wrongs, template=template, vocabulary=vocabulary)
    try:
        stored = read_stored(folder, base.model if base is not None else None)
    except OnebaseError as error:
        tensors = {info.name: read_tensor(info) for info in infos}
        lows = _updates({fixed.names[name]: tensor for name, tensor in tensors.items()}, raw)
        return replace(read, refusal=str(error), lows=lows, tensors=tensors)
    misfit = _misfit(folder, base) if base is not None else ""
    return replace(read, stored=stored, lows=stored.adapter.lowrank, misfit=misfit)


def _misfit(folder: Path, base: HasModel) -> str:
    try:
        load_adapter(folder, base, allow_base_mismatch=True)
    except OnebaseError as error:
        return error.found or str(error)
    return ""


def _template(folder: Path) -> str:
    """The chat template that trainers save beside an adapter, empty where there is none that can be read."""
    jinja = folder / "chat_template.jinja"
    if jinja.is_file():
        return jinja.read_text(encoding="utf-8", errors="replace")
    template = _json(folder / "tokenizer_config.json", False, []).get("chat_template")
    return template if isinstance(template, str) else ""


def _vocabulary(folder: Path) -> dict[str, int]:
    """Each token's id in the tokenizer.json that trainers save beside an adapter, empty where there is none.

    The vocabulary is a mapping or, of Unigram, a list of tokens with their scores; added tokens have their ids.
    """
    told: Any = _json(folder / "tokenizer.json", False, [])
    model, added = told.get("model"), told.get("added_tokens")
    vocabulary: Any = model.get("vocab") if isinstance(model, dict) else None
    if isinstance(vocabulary, list):
        first = [one[0] if isinstance(one, list) and one else None for one in vocabulary]
        vocabulary = {token: number for number, token in enumerate(first)}
    found: dict[str, int] = dict(vocabulary) if fits(dict[str, int], vocabulary) else {}
    for one in added if isinstance(added, list) else ():
        pair: Any = {one.get("content"): one.get("id")} if isinstance(one, dict) else None
        if fits(dict[str, int], pair):
            found.update(pair)
    return found


def _json(path: Path, needed: bool, faults: list[Fault]) -> dict[str, Any]:
    if not path.is_file():
        if needed:
            there = ", ".join(sorted(p.name for p in path.parent.iterdir())) or "nothing"
            advice = "name the folder that the training wrote, or copy the file there"
            faults.append(Fault(f"no {path.name}; the folder holds {there}", advice))
        return {}
    try:
        value = json.loads(path.read_text(encoding="utf-8"))
    except (ValueError, OSError, RecursionError) as error:
        faults.append(Fault(f"{path.name} is not JSON: {error}", "restore it from its source"))
        return {}
    if not isinstance(value, dict):
        faults.append(Fault(f"{path.name} holds no JSON object", "restore it from its source"))
        return {}
    return cast("dict[str, Any]", value)


def _infos(folder: Path, faults: list[Fault]) -> tuple[TensorInfo, ...]:
    """The file's tensors, from its header alone."""
    path = folder / TENSORS
    if not path.is_file():
        pickles = sorted(p.name for p in folder.iterdir() if p.suffix in PICKLES)
        if pickles:
            found = f"only {', '.join(pickles)}: a pickle, which can run code and is never loaded"
            faults.append(
                Fault(found, "save the adapter as safetensors with its maker (safe_serialization=True)")
            )
        else:
            faults.append(Fault(f"no {TENSORS}", "name the folder that the training wrote"))
        return ()
    try:
        infos = tuple(list_tensors(path))
    except OnebaseError as error:
        with path.open("rb") as file:
            pickled = file.read(4).startswith((b"PK\x03\x04", b"\x80\x02", b"\x80\x04"))
        found = f"{TENSORS} is broken: {error.found}"
        if pickled:
            found = f"{TENSORS} is a pickle under a safetensors name, which is never loaded"
        faults.append(Fault(found, "copy it again from its source; it may be cut short"))
        return ()
    if not infos:
        faults.append(Fault(f"{TENSORS} holds no tensor", "save the adapter again"))
    return infos


def number(raw: Mapping[str, Any], key: str) -> float:
    """A number of the config, PEFT's default where it is none."""
    value = raw.get(key)
    return (
        float(value) if isinstance(value, int | float) and fits(float, value) else float(_PEFT_DEFAULTS[key])
    )


def pattern(raw: Mapping[str, Any], key: str) -> dict[str, float]:
    """A pattern of the config; its keys that are no regular expressions are left out."""
    value = raw.get(key)
    return {k: v for k, v in value.items() if _compiles(k)} if fits(dict[str, float], value) and value else {}


def _compiles(text: str) -> bool:
    try:
        require_pattern(f"({text})")
    except ConfigError:
        return False
    return True


def _updates(tensors: Mapping[str, Tensor], raw: Mapping[str, Any]) -> dict[str, LowRank]:
    """The pairs of A and B that go together, each of the rank that it has, with the config's alpha."""
    pairs: dict[str, dict[str, Tensor]] = {}
    embeddings: set[str] = set()
    for name, tensor in tensors.items():
        found = _FACTOR.fullmatch(name.removeprefix(PREFIX))
        if found and tensor.ndim >= 2 and tensor.numel() and tensor.is_floating_point():
            pairs.setdefault(found["path"], {})[found["side"]] = tensor.float().flatten(1)
            embeddings |= {found["path"]} if found["embedding"] else set()
    lows: dict[str, LowRank] = {}
    for path, sides in pairs.items():
        if sides.keys() == {"A", "B"} and sides["A"].shape[0] == sides["B"].shape[1]:
            alpha = pattern_value(pattern(raw, "alpha_pattern"), [path], number(raw, "lora_alpha"))
            scale = scaling(sides["A"].shape[0], alpha, bool(raw.get("use_rslora")))
            kind = "embedding" if path in embeddings else "linear"
            lows[path] = LowRank(sides["A"], sides["B"], scale, kind)
    return lows
