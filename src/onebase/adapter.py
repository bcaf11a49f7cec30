"""`Adapter`: a plain, frozen value. Training makes it, the format stores it, injection puts it on a base."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, Literal, NamedTuple

import torch
from torch import Tensor

from onebase.config import LoraConfig

LayerKind = Literal["linear", "conv1d", "embedding"]
"""The layer an update belongs to; conv1d is GPT-2's linear layer, whose weight is stored transposed."""


class LowRank(NamedTuple):
    """One module's update. A: (r, in), B: (out, r), both float32; the weight changes by scale·B·A."""

    A: Tensor
    B: Tensor
    scale: float
    kind: LayerKind = "linear"

    @property
    def rank(self) -> int:
        """The number of rows of A."""
        return self.A.shape[0]


@dataclass(frozen=True)
class Origin:
    """Where an adapter came from: what must be known to use it rightly, and what is good to know."""

    base: str = ""  # base_model_name_or_path
    fingerprint: str = ""  # digest of the base's stored tensors; empty where the maker did not record it
    task: str = "CAUSAL_LM"  # PEFT's task_type; empty for none
    prompt: Mapping[str, Any] = field(default_factory=dict[str, Any])  # how training rendered a prompt
    training: Mapping[str, Any] = field(default_factory=dict[str, Any])  # steps, data, settings


@dataclass(frozen=True, eq=False)
class Adapter:
    """A set of low-rank updates, and the few modules that were trained in full.

    `lowrank` maps a module's path in the base to its update; `full` maps a module's path to that module's
    own tensors. Two adapters are equal when their configs, origins and tensors are, bit for bit.
    """

    config: LoraConfig
    lowrank: Mapping[str, LowRank]
    full: Mapping[str, Mapping[str, Tensor]] = field(default_factory=dict[str, Mapping[str, Tensor]])
    origin: Origin = Origin()

    def tensors(self) -> dict[str, Tensor]:
        """Every tensor by a readable name: `path.A`, `path.B`, or `path.<parameter>`."""
        named = {f"{path}.{side}": getattr(low, side) for path, low in self.lowrank.items() for side in "AB"}
        return named | {f"{path}.{name}": t for path, state in self.full.items() for name, t in state.items()}

    @property
    def parameters(self) -> int:
        """The number of trained values."""
        return sum(tensor.numel() for tensor in self.tensors().values())

    def __eq__(self, other: object) -> bool:
        if not isinstance(other, Adapter):
            return NotImplemented
        mine, theirs = self.tensors(), other.tensors()
        facts = [
            (a.config, a.origin, {p: (low.scale, low.kind) for p, low in a.lowrank.items()})
            for a in (self, other)
        ]
        return (
            facts[0] == facts[1]
            and mine.keys() == theirs.keys()
            and all(_same_bits(tensor, theirs[name]) for name, tensor in mine.items())
        )

    __hash__ = None  # pyright: ignore[reportAssignmentType]  # holds tensors: compared, never hashed


def _same_bits(one: Tensor, other: Tensor) -> bool:
    """Equal in dtype, shape and every bit: unlike torch.equal, -0.0 is not 0.0 and a NaN equals itself."""
    if (one.dtype, one.shape) != (other.dtype, other.shape):
        return False
    first, second = (t.detach().cpu().contiguous().reshape(-1).view(torch.uint8) for t in (one, other))
    return torch.equal(first, second)
