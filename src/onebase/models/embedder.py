"""How a text becomes a vector: the pooling that a sentence-transformers folder states, and the pooling itself."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from onebase.errors import BaseError, FormatError
from onebase.options import fits
from onebase.tasks import EMBED, POOLINGS

MODULES, POOLING, SENTENCES = "modules.json", "1_Pooling", "sentence_bert_config.json"
# sentence-transformers' names -> ours.
MODES = {
    "pooling_mode_mean_tokens": "mean",
    "pooling_mode_cls_token": "cls",
    "pooling_mode_lasttoken": "last",
    "pooling_mode_max_tokens": "max",
}
SHORT = {"mean": "mean", "cls": "cls", "lasttoken": "last", "max": "max"}
CHOOSE = "say how with --pooling mean, cls, last or max"


@dataclass(frozen=True)
class Embedder:
    """How the states of a text's tokens become its vector, and how vectors were compared in training.

    `pooling`: mean, cls (the first), last or max of the real tokens' states. `normalize`: vectors have length 1.
    `scale`: cosine similarities are multiplied by it in the loss (1/temperature). `longest`: tokens of a text (0: what
    the base takes).
    """

    pooling: str = "mean"
    normalize: bool = False
    scale: float = 20.0
    longest: int = 0

    def as_dict(self) -> dict[str, Any]:
        """JSON-ready: `from_dict(e.as_dict()) == e`."""
        return {"task": EMBED, **dataclasses.asdict(self)}

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> Embedder:
        """The inverse of `as_dict`; a FormatError for anything else, since it is read from a file."""
        own = {name: value for name, value in values.items() if name != "task"}
        hints: dict[str, Any] = {"pooling": str, "normalize": bool, "scale": float, "longest": int}
        good = own.keys() == hints.keys() and all(fits(hints[name], value) for name, value in own.items())
        if values.get("task") != EMBED or not good or own["pooling"] not in POOLINGS:
            raise FormatError("head", f"{dict(values)!r} does not say how a text becomes a vector")
        return cls(**own)


def stated(folder: Path | None, pooling: str = "", scale: float = Embedder.scale) -> Embedder:
    """What a base's folder states in sentence-transformers' files; the mean as it is where it has none.

    `pooling` goes over what it states. Raises BaseError where the files name what onebase does not compute (a Dense
    layer, two poolings at once) and no pooling was given.
    """
    if folder is None:
        return Embedder(pooling or Embedder.pooling, scale=scale)
    modules = _read(folder / MODULES, list[Any]())
    kinds = {str(one.get("type", "")).rpartition(".")[2]: str(one.get("path", "")) for one in modules}
    normalize, longest = (
        "Normalize" in kinds,
        _read(folder / SENTENCES, dict[str, Any]()).get("max_seq_length"),
    )
    own = pooling or _stated_pooling(folder, kinds)
    return Embedder(own, normalize, scale, int(longest or 0))


def _stated_pooling(folder: Path, kinds: Mapping[str, str]) -> str:
    if odd := sorted(kinds.keys() - {"Transformer", "Pooling", "Normalize"}):
        found = f"its {MODULES} has {', '.join(odd)}, which onebase does not compute"
        raise BaseError(f"vectors of base {folder}", found, hint=CHOOSE)
    place = folder / (kinds.get("Pooling") or POOLING) / "config.json"
    if "Pooling" in kinds and not place.is_file():
        found = f"{MODULES} names {place.parent.name}/config.json, which is not there"
        raise BaseError(f"vectors of base {folder}", found, hint=CHOOSE)
    return _pooling(place, _read(place, {"pooling_mode": Embedder.pooling}))


def _pooling(path: Path, config: Mapping[str, Any]) -> str:
    """The one pooling that a 1_Pooling/config.json names, in either of its forms."""
    on = [name for name, value in config.items() if name.startswith("pooling_mode_") and value is True]
    named = config.get("pooling_mode")
    found = SHORT.get(str(named)) if named else MODES.get(on[0]) if len(on) == 1 else None
    if found is None:
        told = named or " and ".join(on) or "none"
        raise BaseError(f"pooling of {path}", f"{told}, which onebase does not compute", hint=CHOOSE)
    return found


def _read(path: Path, default: Any) -> Any:
    if not path.is_file():
        return default
    try:
        found: Any = json.loads(path.read_text(encoding="utf-8"))
    except (ValueError, OSError) as error:
        raise BaseError(f"read {path}", str(error)) from error
    if not isinstance(found, type(default)):
        raise BaseError(f"read {path}", f"holds no {type(default).__name__}")
    return found


def pool(states_BTW: Tensor, mask_BT: Tensor, embedder: Embedder) -> Tensor:
    """(B, W) in float32: each text's vector out of its tokens' states; mask: 1 on real tokens, which come first."""
    made = POOLS[embedder.pooling](states_BTW.float(), mask_BT)
    return torch.nn.functional.normalize(made, dim=-1) if embedder.normalize else made


def _mean(states: Tensor, mask: Tensor) -> Tensor:
    weights = mask.unsqueeze(-1).to(states.dtype)
    return (states * weights).sum(1) / weights.sum(1)


def _last(states: Tensor, mask: Tensor) -> Tensor:
    rows = torch.arange(len(states), device=states.device)
    return states[rows, mask.sum(1) - 1]


POOLS: dict[str, Callable[[Tensor, Tensor], Tensor]] = {
    "mean": _mean,
    "cls": lambda states, mask: states[:, 0],
    "last": _last,
    "max": lambda states, mask: states.masked_fill(mask.unsqueeze(-1) == 0, float("-inf")).amax(1),
}
