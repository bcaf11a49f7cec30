"""An adapter rewritten for readers that know less than PEFT: plain updates of one rank, all with scale 1."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor

from onebase.adapters.adapter import Adapter, LayerKind, LowRank
from onebase.adapters.kinds import KINDS, merged_weight
from onebase.config import LoraConfig
from onebase.errors import ConfigError, FormatError, OutputExists
from onebase.files import atomic_folder
from onebase.options import require
from onebase.storage.adapter_files import CONFIG
from onebase.storage.format import read_adapter, write_adapter

# Shape suffixes: i = in features, o = out features, r = rank.

LIMIT = 1e-5  # largest relative difference that rounding to float32 may make
CHUNK = 1 << 22  # values of two updates that are compared at a time

# What only PEFT (and onebase) computes, by field of an update or by kind, as users know it.
_FIELDS = {"magnitude": "DoRA's norms", "bias": "a trained bias (lora_bias)"}
_KINDS: dict[LayerKind, str] = {
    "conv": "a convolution",
    "parameter": "a parameter without a layer (target_parameters)",
    "parameter_transposed": "a parameter without a layer (target_parameters)",
}


class Difference(NamedTuple):
    """How far an update is from the one that it should be, value by value, in float64."""

    absolute: float  # the largest |s·B·A - s'·B'·A'|
    relative: float  # of the largest |s·B·A|


def portable(adapter: Adapter) -> Adapter:
    """The same updates for a reader that knows only `r` and `lora_alpha`, or not even these.

    The scale goes into B and ranks are filled up with zeros, so alpha = r everywhere: alpha/r, alpha/sqrt(r) of a
    reader that overlooks patterns, or no scale at all come to the same update (rsLoRA's flag is gone). Exact but for
    one rounding of B to float32; a scale that is a power of two loses nothing. Raises ConfigError that names
    everything a plain LoRA cannot hold: DoRA (see `without_norms`), biases, modules trained in full, token rows,
    convolutions and parameters.
    """
    _require_plain(adapter)
    rank = max(low.rank for low in adapter.lowrank.values())
    lows = {path: _folded(path, low, rank) for path, low in adapter.lowrank.items()}
    config = LoraConfig(rank=rank, alpha=rank, target_modules=_names(adapter))
    return replace(adapter, config=config, lowrank=lows)


def _require_plain(adapter: Adapter) -> None:
    found = _unplain(adapter)
    if not found and adapter.lowrank:
        return
    lines = [f"{what}: {_some(places)}" for what, places in found.items()] or ["it holds no low-rank update"]
    hint = "onebase export --to merged puts everything into the weights"
    if list(found) == [_FIELDS["magnitude"]]:
        hint += "; --fit RANK with --base makes a low-rank fit, and says how far off it is"
    asked = "a plain LoRA, as llama.cpp and vLLM read it, cannot hold this adapter"
    raise ConfigError(asked, "\n  " + "\n  ".join(lines), hint=hint)


def _unplain(adapter: Adapter) -> dict[str, list[str]]:
    """What a plain LoRA has no place for -> where the adapter has it."""
    found: dict[str, list[str]] = {}
    for path, low in adapter.lowrank.items():
        whats = [_FIELDS[name] for name in low.tensors() if name in _FIELDS]
        for what in whats + ([_KINDS[low.kind]] if low.kind in _KINDS else []):
            found.setdefault(what, []).append(path)
    low_names = {f"{path}.{name}" for path, low in adapter.lowrank.items() for name in low.tensors()}
    if rest := sorted(adapter.tensors().keys() - low_names):
        found["trained as they stand (modules_to_save, token rows)"] = rest
    return found


def _some(places: list[str], count: int = 3) -> str:
    more = f" and {len(places) - count} more" if len(places) > count else ""
    return ", ".join(places[:count]) + more


def _folded(path: str, low: LowRank, rank: int) -> LowRank:
    a, b = torch.zeros(rank, low.A.shape[1]), torch.zeros(low.B.shape[0], rank)
    a[: low.rank], b[:, : low.rank] = low.A, (low.B.double() * low.scale).float()
    if not b.isfinite().all():
        raise ConfigError(f"fold the scale {low.scale:g} into {path}", "the result is not finite in float32")
    return low._replace(A=a, B=b, scale=1.0)


def _names(adapter: Adapter) -> list[str]:
    """Plain names of the targets: the config's where they alone say what is meant, else full paths."""
    config = adapter.config
    named = isinstance(config.target_modules, tuple) and not (config.exclude_modules or config.layers)
    return list(config.target_modules) if named else sorted(adapter.lowrank)


def without_norms(
    adapter: Adapter, weight: Callable[[str], Tensor], rank: int
) -> tuple[Adapter, dict[str, float]]:
    """Each DoRA update as the plain one of rank `rank` that is nearest to it, and each one's relative error.

    `weight` gives the base's weight of a path. DoRA's W' - W is rarely of low rank, for it scales whole rows of W;
    this is its best fit in the Frobenius norm (Eckart and Young 1936), and the error is |W' - W - B·A| / |W' - W|.
    Other updates stay as they are. Raises ConfigError where there is no DoRA or the rank is out of range.
    """
    require("fit", rank, rank >= 1, "at least 1")
    normed = {path: low for path, low in adapter.lowrank.items() if low.magnitude is not None}
    if not normed:
        hint = "leave --fit out; to make an adapter smaller: onebase combine ADAPTER --method svd --rank N"
        raise ConfigError(
            f"option fit={rank}", "the adapter has no DoRA update, so it is exact without", hint=hint
        )
    largest = max(min(low.B.shape[0], low.A.shape[1]) for low in normed.values())
    require("fit", rank, rank <= largest, f"at most {largest}, the largest rank of these weights")
    fits = {path: _fitted(low, weight(path), rank) for path, low in normed.items()}
    lows = dict(adapter.lowrank) | {path: low for path, (low, _) in fits.items()}
    return replace(adapter, lowrank=lows), {path: error for path, (_, error) in fits.items()}


def _fitted(low: LowRank, weight: Tensor, rank: int) -> tuple[LowRank, float]:
    wide = low._replace(**{name: tensor.double() for name, tensor in low.tensors().items()})
    change = merged_weight(weight.double(), wide) - weight.double()
    change_oi = (change.T if KINDS[low.kind].transposed else change).reshape(low.B.shape[0], -1)
    u, s, vh = torch.linalg.svd(change_oi, full_matrices=False)
    error = float(s[rank:].norm() / s.norm()) if s.any() else 0.0
    a, b = vh[:rank], u[:, :rank] * s[:rank]
    return low._replace(A=a.float(), B=b.float(), scale=1.0, magnitude=None), error


def differences(source: Adapter, result: Mapping[str, LowRank]) -> dict[str, Difference]:
    """How far each update of `result` is from the source's. Raises FormatError where the paths or shapes differ."""
    if source.lowrank.keys() != result.keys():
        odd = sorted(source.lowrank.keys() ^ result.keys())
        raise FormatError("compare with the source adapter", f"only one of them has {_some(odd)}")
    return {path: _difference(path, low, result[path]) for path, low in source.lowrank.items()}


def _difference(path: str, source: LowRank, result: LowRank) -> Difference:
    if (source.B.shape[0], source.A.shape[1]) != (result.B.shape[0], result.A.shape[1]):
        raise FormatError("compare with the source adapter", f"{path} has another shape")
    (a, b), (a_, b_) = ((low.A.double(), low.B.double() * low.scale) for low in (source, result))
    rows = max(1, CHUNK // a.shape[1])
    largest, off = torch.zeros(2, dtype=torch.float64)
    for start in range(0, b.shape[0], rows):
        wanted = b[start : start + rows] @ a
        largest = torch.maximum(largest, wanted.abs().max())  # unlike Python's max it keeps a NaN
        off = torch.maximum(off, (wanted - b_[start : start + rows] @ a_).abs().max())
    return Difference(float(off), float(off / largest) if off else 0.0)


def worst(found: Iterable[Difference]) -> Difference:
    """The largest of each measure."""
    absolutes, relatives = zip(*found, strict=True)
    return Difference(max(absolutes), max(relatives))


def require_near(found: Mapping[str, Difference], limit: float, hint: str = "") -> Difference:
    """The largest difference. Raises FormatError that names the updates further off than `limit`, relative."""
    far = [f"{path} ({one.relative:.2g})" for path, one in found.items() if not one.relative <= limit]
    if far:
        asked = f"what was written is further from the source adapter than {limit:g}, relative"
        raise FormatError(asked, _some(far), hint=hint)
    return worst(found.values())


def save_exact(adapter: Adapter, folder: str | Path) -> Path:
    """Write an adapter folder as PEFT has it, read it back, and require every bit to be there.

    Raises OutputExists, OutputError, FormatError; nothing is left then.
    """
    with atomic_folder(_free(folder)) as temporary:
        write_adapter(adapter, temporary)
        mine, theirs = adapter.tensors(), read_adapter(temporary).tensors()
        odd = [name for name in mine.keys() | theirs if name not in mine or name not in theirs]
        odd = odd or [name for name, tensor in mine.items() if not torch.equal(tensor, theirs[name])]
        if odd:
            raise FormatError("the adapter as written is not the source", _some(sorted(odd)))
    return Path(folder)


def save_portable(adapter: Adapter, source: Adapter, folder: str | Path) -> Difference:
    """Write what `portable` made of `source`, with only the settings that every reader knows, and read it back.

    Returns the largest difference from the source. Raises OutputExists, OutputError, or FormatError where that is
    more than rounding; nothing is left then.
    """
    with atomic_folder(_free(folder)) as temporary:
        write_adapter(adapter, temporary)
        config: dict[str, Any] = json.loads((temporary / CONFIG).read_text(encoding="utf-8"))
        # Old releases refuse settings that they do not know, even where they are off.
        kept = {
            name: value
            for name, value in config.items()
            if value is not False and value not in (None, {}, [])
        }
        (temporary / CONFIG).write_text(json.dumps(kept, indent=2, sort_keys=True) + "\n", encoding="utf-8")
        return require_near(differences(source, read_adapter(temporary).lowrank), LIMIT)


def _free(folder: str | Path) -> Path:
    if Path(folder).exists():
        raise OutputExists(f"export to {folder}", "it exists already", hint="choose another folder")
    return Path(folder)
