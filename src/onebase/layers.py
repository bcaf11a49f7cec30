"""A base layer with named adapter slots beside it. A forward pass reads weights and never changes them.

Which adapter a call uses is a context variable, so two threads or two requests cannot leak into each other.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextvars import ContextVar
from typing import Any, NamedTuple, cast, final

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from onebase.adapter import LayerKind, LowRank
from onebase.errors import AdapterNameError
from onebase.ops.lowrank import effective_weight, lowrank, lowrank_rows


class Selection(NamedTuple):
    """What a call uses: one adapter for all rows, none, or one for each row of the batch."""

    name: str | None
    rows: tuple[str | None, ...] | None = None

    def groups(self, count: int) -> list[tuple[str, Tensor]]:
        """The rows of each adapter, as (name, row numbers); rows on the plain base are in none."""
        assert self.rows is not None
        if len(self.rows) != count:
            raise AdapterNameError(
                f"{len(self.rows)} adapter names for a batch", f"the batch has {count} rows"
            )
        names = sorted({name for name in self.rows if name is not None})
        return [(n, torch.tensor([i for i, row in enumerate(self.rows) if row == n])) for n in names]


ACTIVE: ContextVar[Selection] = ContextVar("onebase_active")


def selection() -> Selection:
    """The current call's choice; an error where none was made, since a guess would be silently wrong."""
    try:
        return ACTIVE.get()
    except LookupError:
        hint = "run the model inside `with onebase.use(model, NAME):` (or None for the plain base)"
        raise AdapterNameError(
            "which adapter?", "adapters are injected, and this call chose none", hint=hint
        ) from None


class Kind(NamedTuple):
    """How one sort of base layer meets its update."""

    accepts: Callable[[nn.Module], bool]
    features: Callable[[Any], tuple[int, int]]  # (in, out)
    delta: Callable[
        [Any, Tensor, LowRank], Tensor
    ]  # (base layer, input, update) -> what is added to its output
    transposed: bool  # the base stores (in, out) instead of (out, in)


def _is_conv1d(module: nn.Module) -> bool:
    """transformers' Conv1D, told by its structure: a 2-D (in, out) weight and `nf` = out."""
    weight = getattr(module, "weight", None)
    return (
        hasattr(module, "nf")
        and isinstance(weight, Tensor)
        and weight.ndim == 2
        and weight.shape[1] == module.nf
    )


def _linear_delta(_: nn.Module, x: Tensor, low: LowRank) -> Tensor:
    return lowrank(x, low.A, low.B, low.scale)


def _embedding_delta(base: nn.Embedding, ids: Tensor, low: LowRank) -> Tensor:
    """Gemma's embeddings multiply their output by `embed_scale`; the update must be multiplied too."""
    return lowrank_rows(ids, low.A, low.B, low.scale) * getattr(base, "embed_scale", 1.0)


def _linear_shape(m: nn.Linear) -> tuple[int, int]:
    return m.in_features, m.out_features


def _stored_shape(m: nn.Module) -> tuple[int, int]:
    """(in, out) of a layer that stores its weight so: Conv1D, and an embedding (vocabulary, width)."""
    rows, columns = cast("Tensor", m.weight).shape
    return rows, columns


def _is(layer_type: type[nn.Module]) -> Callable[[nn.Module], bool]:
    return lambda module: isinstance(module, layer_type)


KINDS: dict[LayerKind, Kind] = {
    "linear": Kind(_is(nn.Linear), _linear_shape, _linear_delta, transposed=False),
    "conv1d": Kind(_is_conv1d, _stored_shape, _linear_delta, transposed=True),
    "embedding": Kind(_is(nn.Embedding), _stored_shape, _embedding_delta, transposed=True),
}


def kind_of(module: nn.Module) -> LayerKind | None:
    """The kind of a base layer, None where it cannot carry an update."""
    return next((name for name, kind in KINDS.items() if kind.accepts(module)), None)


def merged_weight(weight: Tensor, low: LowRank) -> Tensor:
    """W + s·B·A in the base layer's own orientation."""
    if KINDS[low.kind].transposed:
        return effective_weight(weight.T, low.A, low.B, low.scale).T
    return effective_weight(weight, low.A, low.B, low.scale)


def _key(name: str) -> str:
    """A ModuleDict key for any adapter name (its keys must hold no dot and shadow no method)."""
    return "@" + name.replace("%", "%25").replace(".", "%2E")


@final
class Slot(nn.Module):
    """One adapter's factors at one layer."""

    def __init__(self, low: LowRank, dropout: float) -> None:
        super().__init__()
        self.A = nn.Parameter(low.A.clone(), requires_grad=False)
        self.B = nn.Parameter(low.B.clone(), requires_grad=False)
        self.scale, self.dropout = low.scale, dropout
        self.kind: LayerKind = low.kind

    def low(self) -> LowRank:
        """The factors, attached to autograd."""
        return LowRank(self.A, self.B, self.scale, self.kind)


@final
class LoraLayer(nn.Module):
    """A base layer (Linear, Conv1D or Embedding) and the slots of the adapters that target it."""

    def __init__(self, base: nn.Module, kind: LayerKind) -> None:
        super().__init__()
        self.base = base
        self.kind: LayerKind = kind
        self.slots = nn.ModuleDict()

    def __getattr__(self, name: str) -> Any:
        # Models read `.weight`, `.in_features` and the like of their layers: answer as the base layer would.
        try:
            return super().__getattr__(name)
        except AttributeError:
            return getattr(super().__getattr__("base"), name)

    def slot(self, name: str) -> Slot | None:
        """The slot of an adapter, None where it does not target this layer."""
        key = _key(name)
        return cast("Slot", self.slots[key]) if key in self.slots else None

    def add(self, name: str, low: LowRank, dropout: float) -> None:
        """Give an adapter a slot, on the base layer's device."""
        device = next(self.base.parameters()).device
        self.slots[_key(name)] = Slot(low, dropout).to(device).train(self.training)

    def remove(self, name: str) -> None:
        """Take an adapter's slot away."""
        del self.slots[_key(name)]

    def _delta(self, slot: Slot, x: Tensor) -> Tensor:
        if slot.dropout and self.training and self.kind != "embedding":
            x = F.dropout(x, slot.dropout)
        return KINDS[self.kind].delta(self.base, x, slot.low())

    def forward(self, x: Tensor) -> Tensor:
        """The base's output plus the chosen adapter's update, in the base's output dtype."""
        chosen, y = selection(), self.base(x)
        if chosen.rows is not None:
            for name, rows in chosen.groups(x.shape[0]):
                if (slot := self.slot(name)) is not None:
                    rows = rows.to(x.device)
                    y = y.index_copy(0, rows, (y[rows] + self._delta(slot, x[rows])).to(y.dtype))
            return y
        slot = self.slot(chosen.name) if chosen.name is not None else None
        return y if slot is None else (y + self._delta(slot, x)).to(y.dtype)


@final
class TrainedModule(nn.Module):
    """A base module and, for each adapter that trains it in full, a float32 copy that stands in for it."""

    def __init__(self, base: nn.Module) -> None:
        super().__init__()
        self.base = base
        self.copies = nn.ModuleDict()

    def __getattr__(self, name: str) -> Any:
        try:
            return super().__getattr__(name)
        except AttributeError:
            return getattr(super().__getattr__("base"), name)

    def copy(self, name: str) -> nn.Module | None:
        """An adapter's copy, None where it has none here."""
        key = _key(name)
        return self.copies[key] if key in self.copies else None

    def add(self, name: str, copy: nn.Module) -> None:
        """Let `copy` stand in for the base module while the adapter is active."""
        self.copies[_key(name)] = copy.requires_grad_(False).train(self.training)

    def remove(self, name: str) -> None:
        """Take an adapter's copy away."""
        del self.copies[_key(name)]

    def forward(self, x: Tensor) -> Tensor:
        """The copy's output for the rows whose adapter has one, the base's for the others."""
        chosen = selection()
        if chosen.rows is not None:
            y = self.base(x)
            for name, rows in chosen.groups(x.shape[0]):
                if (copy := self.copy(name)) is not None:
                    rows = rows.to(x.device)
                    y = y.index_copy(0, rows, _call_wide(copy, x[rows]).to(y.dtype))
            return y
        copy = self.copy(chosen.name) if chosen.name is not None else None
        return self.base(x) if copy is None else _call_wide(copy, x).to(next(self.base.parameters()).dtype)


def _call_wide(copy: nn.Module, x: Tensor) -> Tensor:
    return copy(x.float() if x.is_floating_point() else x)


Wrapper = LoraLayer | TrainedModule


def bare(module: nn.Module) -> nn.Module:
    """The base's own module inside the wrappers around it."""
    while isinstance(module, Wrapper):
        module = module.base
    return module


def walk(module: nn.Module, path: str = "") -> Iterator[tuple[str, nn.Module, tuple[Wrapper, ...]]]:
    """(path, module, the wrappers around it from the outside in), with paths as they are without adapters.

    Parents come before their children; a module that is shared comes under each of its paths.
    """
    around: list[Wrapper] = []
    while isinstance(module, Wrapper):
        around.append(module)
        module = module.base
    yield path, module, tuple(around)
    for name, child in module._modules.items():  # pyright: ignore[reportPrivateUsage]  # named_children skips doubles
        if child is not None:
            yield from walk(child, f"{path}.{name}" if path else name)


def base_modules(model: nn.Module) -> Iterator[tuple[str, nn.Module]]:
    """(path, module) as they are without adapters; a module that is shared comes under each of its paths."""
    return ((path, module) for path, module, _ in walk(model))
