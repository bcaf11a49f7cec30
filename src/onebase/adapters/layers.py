"""A base layer with named adapter slots beside it. A forward pass reads weights and never changes them.

Which adapter a call uses is a context variable, so two threads or two requests cannot leak into each other.
"""

from __future__ import annotations

import copy
from collections.abc import Iterator, Mapping
from contextvars import ContextVar
from typing import Any, NamedTuple, cast, final

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from onebase.adapters.adapter import LayerKind, LowRank, joined, parted
from onebase.adapters.kinds import KINDS, as_rows, merged_weight, over_channels
from onebase.errors import AdapterNameError
from onebase.ops.lowrank import row_norms


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


def slot_key(name: str) -> str:
    """A ModuleDict key for any adapter name (its keys must hold no dot and shadow no method)."""
    return "@" + name.replace("%", "%25").replace(".", "%2E")


def _name(key: str) -> str:
    """The name that `slot_key` made this of."""
    return key[1:].replace("%2E", ".").replace("%25", "%")


@final
class Slot(nn.Module):
    """One adapter's update at one site: the tensors that are trained, and those of its start that are held fixed."""

    def __init__(self, low: LowRank, dropout: float, held: bool = False) -> None:
        super().__init__()
        trained, start = parted(low, low.rank // 2) if held else (low, None)
        for name, tensor in trained.tensors().items():
            setattr(self, name, nn.Parameter(tensor.clone(memory_format=torch.contiguous_format), False))
        self.start = nn.ParameterList([start.A.clone(), start.B.clone()] if start else [])
        self.start.requires_grad_(False)
        self.scale, self.dropout, self.kind = low.scale, dropout, low.kind
        self._fixed = trained._replace(**dict.fromkeys(trained.tensors()))

    def low(self) -> LowRank:
        """The update, attached to autograd."""
        low = self._fixed._replace(**self._parameters)
        if not len(self.start):
            return low
        a, b = self.start
        return joined(low, low._replace(A=a, B=b))


class Wrapper(nn.Module):
    """A module of the base and what stands beside it; answers for the base module in all else."""

    def __init__(self, base: nn.Module) -> None:
        super().__init__()
        self.base = base
        # nn.TransformerEncoderLayer, in eval mode, passes its layers' weights to a fused kernel and would never
        # call us. It does not where a module has a hook; torch has no other way to tell it.
        self.register_forward_pre_hook(_nothing)

    def __getattr__(self, name: str) -> Any:
        # Models read `.weight`, `.in_features` and the like of their layers: answer as the base layer would.
        try:
            return super().__getattr__(name)
        except AttributeError:
            return getattr(super().__getattr__("base"), name)

    def device(self) -> torch.device:
        """Where the base module is."""
        return next(self.base.parameters()).device


def _nothing(module: nn.Module, arguments: Any) -> None:
    return None


@final
class LoraLayer(Wrapper):
    """A base layer (linear, embedding or convolution) and the slots of the adapters that target it."""

    def __init__(self, base: nn.Module, kind: LayerKind) -> None:
        super().__init__(base)
        self.kind: LayerKind = kind
        self.slots = nn.ModuleDict()

    def slot(self, name: str) -> Slot | None:
        """The slot of an adapter, None where it does not target this layer."""
        key = slot_key(name)
        return cast("Slot", self.slots[key]) if key in self.slots else None

    def add(self, name: str, slot: Slot) -> None:
        """Give an adapter a slot, on the base layer's device."""
        self.slots[slot_key(name)] = slot.to(self.device()).train(self.training)

    def remove(self, name: str) -> None:
        """Take an adapter's slot away."""
        del self.slots[slot_key(name)]

    def _delta(self, slot: Slot, x: Tensor, y: Tensor) -> Tensor:
        """What is added to the base's output y."""
        low = slot.low()
        if slot.dropout and self.training and self.kind != "embedding":
            x = F.dropout(x, slot.dropout)
        delta = KINDS[self.kind].product(self.base, x, low)
        if low.bias is not None:
            delta = delta + over_channels(low.bias, low) * low.scale
        return delta if low.magnitude is None else self._given_norms(low, delta, y)

    def _given_norms(self, low: LowRank, delta: Tensor, y: Tensor) -> Tensor:
        """DoRA: the layer's output without its bias, y + delta, times magnitude / norm; less y itself."""
        assert low.magnitude is not None
        ratio = over_channels(low.magnitude / row_norms(as_rows(self.weight, low), low.factors), low)
        bias = getattr(self.base, "bias", None)
        plain = y if bias is None else y - over_channels(bias, low)
        return (ratio - 1) * plain + ratio * delta

    def forward(self, x: Tensor) -> Tensor:
        """The base's output plus the chosen adapter's update, in the base's output dtype."""
        chosen, y = selection(), self.base(x)
        if chosen.rows is not None:
            for name, rows in chosen.groups(x.shape[0]):
                if (slot := self.slot(name)) is not None:
                    rows = rows.to(x.device)
                    own = y[rows]
                    y = y.index_copy(0, rows, (own + self._delta(slot, x[rows], own)).to(y.dtype))
            return y
        slot = self.slot(chosen.name) if chosen.name is not None else None
        return y if slot is None else (y + self._delta(slot, x, y)).to(y.dtype)


@final
class ParameterLayer(Wrapper):
    """A module that uses parameters of its own (attention inputs, experts), and the slots for them.

    A call runs the module's own code with W + s·B·A where W stood: on a shallow copy, so the base is not touched.
    """

    def __init__(self, base: nn.Module) -> None:
        super().__init__(base)
        self.slots = nn.ModuleDict()  # adapter -> parameter -> Slot

    def slot(self, name: str) -> dict[str, Slot] | None:
        """An adapter's slots by parameter, None where it targets none here."""
        key = slot_key(name)
        if key not in self.slots:
            return None
        held = cast("nn.ModuleDict", self.slots[key])
        return {_name(parameter): cast("Slot", slot) for parameter, slot in held.items()}

    def add(self, name: str, parameter: str, slot: Slot) -> None:
        """Give an adapter a slot for one of the parameters, on the base's device."""
        key = slot_key(name)
        if key not in self.slots:
            self.slots[key] = nn.ModuleDict()
        cast("nn.ModuleDict", self.slots[key])[slot_key(parameter)] = slot.to(self.device()).train(
            self.training
        )

    def remove(self, name: str) -> None:
        """Take an adapter's slots away."""
        del self.slots[slot_key(name)]

    def _changed(self, name: str) -> nn.Module:
        slots = self.slot(name)
        if slots is None:
            return self.base
        # Contiguous, as the base's own: another layout may go to another kernel, which rounds differently.
        return _with_tensors(
            self.base,
            {p: merged_weight(self.base.get_parameter(p), s.low()).contiguous() for p, s in slots.items()},
        )

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        """The base module's output with the chosen adapter's parameters."""
        chosen = selection()
        if chosen.rows is None:
            return (self.base if chosen.name is None else self._changed(chosen.name))(*args, **kwargs)
        result = self.base(*args, **kwargs)
        for name, rows in chosen.groups(len(chosen.rows)):
            if (
                self.slot(name) is not None
            ):  # the whole batch once for each adapter: rows may not be apart inside
                result = self._with_rows(result, self._changed(name)(*args, **kwargs), rows)
        return result

    def _with_rows(self, all_rows: Any, own: Any, rows: Tensor) -> Any:
        """Each tensor of the module's result with an adapter's rows put in."""
        if isinstance(self.base, nn.MultiheadAttention) and not self.base.batch_first:
            return _put_rows(all_rows[0], own[0], rows, 1), _put_rows(all_rows[1], own[1], rows, 0)
        return _put_rows(all_rows, own, rows, 0)


def _put_rows(all_rows: Any, own: Any, rows: Tensor, dim: int) -> Any:
    """`own` in place of the named rows; where a batch was flattened to tokens, each row stands for its tokens."""
    if isinstance(all_rows, tuple | list):
        pairs = zip(cast("list[Any]", all_rows), own, strict=True)
        return tuple(_put_rows(one, other, rows, dim) for one, other in pairs)
    if all_rows is None:
        return None
    chosen = selection().rows
    assert chosen is not None
    if not all_rows.ndim or all_rows.shape[dim] % len(chosen):
        found = f"a module's output of shape {tuple(all_rows.shape)} does not have them as rows"
        raise AdapterNameError(f"{len(chosen)} adapter names for a batch", found)
    each = all_rows.shape[dim] // len(chosen)
    places = (rows[:, None] * each + torch.arange(each)).flatten().to(all_rows.device)
    return all_rows.index_copy(dim, places, own.index_select(dim, places))


def _with_tensors(module: nn.Module, tensors: Mapping[str, Tensor]) -> nn.Module:
    """A shallow copy of a module that shares all but the named parameters (dots lead into modules inside)."""
    twin = copy.copy(module)
    twin._parameters, twin._modules = dict(module._parameters), dict(module._modules)  # pyright: ignore[reportPrivateUsage]
    for name, tensor in tensors.items():
        child, _, rest = name.partition(".")
        if rest:
            inside = twin._modules[child]  # pyright: ignore[reportPrivateUsage]
            assert inside is not None
            twin._modules[child] = _with_tensors(inside, {rest: tensor})  # pyright: ignore[reportPrivateUsage]
        else:
            del twin._parameters[name]  # pyright: ignore[reportPrivateUsage]
            twin.__dict__[name] = tensor
    return twin


@final
class TrainedModule(Wrapper):
    """A base module and, for each adapter that trains it in full, a float32 copy that stands in for it."""

    def __init__(self, base: nn.Module) -> None:
        super().__init__(base)
        self.copies = nn.ModuleDict()

    def copy(self, name: str) -> nn.Module | None:
        """An adapter's copy, None where it has none here."""
        key = slot_key(name)
        return self.copies[key] if key in self.copies else None

    def add(self, name: str, copy: nn.Module) -> None:
        """Let `copy` stand in for the base module while the adapter is active."""
        self.copies[slot_key(name)] = copy.requires_grad_(False).train(self.training)

    def remove(self, name: str) -> None:
        """Take an adapter's copy away."""
        del self.copies[slot_key(name)]

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        """The copy's output for the rows whose adapter has one, the base's for the others."""
        chosen = selection()
        if chosen.rows is not None:
            if not any(self.copy(name) for name in chosen.rows if name is not None):
                return self.base(*args, **kwargs)
            if len(args) != 1 or kwargs:
                found = f"a {type(self.base).__name__} that is trained in full takes more than one input"
                raise AdapterNameError("adapters mixed in a batch", found, hint="one adapter at a time")
            return self._mixed(args[0], chosen)
        copy = self.copy(chosen.name) if chosen.name is not None else None
        if copy is None:
            return self.base(*args, **kwargs)
        result = copy(*_floats_as(args, torch.float32), **_floats_as(kwargs, torch.float32))
        return _floats_as(result, next(self.base.parameters()).dtype)

    def _mixed(self, x: Tensor, chosen: Selection) -> Tensor:
        """A copy may have more rows than the base (added tokens): other rows of the batch get -inf for these."""
        groups = [(rows.to(x.device), self.copy(name)) for name, rows in chosen.groups(x.shape[0])]
        groups = [(rows, twin) for rows, twin in groups if twin is not None]
        known = x
        if not x.is_floating_point():  # the base has no row for an added token
            for rows, _ in groups:
                known = known.index_fill(0, rows, 0)
        y = self.base(known)
        for rows, twin in groups:
            own = twin(_floats_as(x[rows], torch.float32)).to(y.dtype)
            width = max(own.shape[-1], y.shape[-1])
            y = _widened(y, width).index_copy(0, rows, _widened(own, width))
        return y


def _widened(y: Tensor, width: int) -> Tensor:
    return F.pad(y, (0, width - y.shape[-1]), value=-torch.inf) if y.shape[-1] < width else y


def _floats_as(value: Any, dtype: torch.dtype) -> Any:
    """Every floating-point tensor in another dtype, also inside tuples and dicts; all else as it is."""
    if isinstance(value, Tensor):
        return value.to(dtype) if value.is_floating_point() else value
    if type(value) in (tuple, list):
        return type(value)(_floats_as(one, dtype) for one in value)
    return {k: _floats_as(v, dtype) for k, v in value.items()} if type(value) is dict else value


def bare(module: nn.Module) -> nn.Module:
    """The base's own module inside the wrappers around it."""
    while isinstance(module, Wrapper):
        module = module.base
    return module


def walk(module: nn.Module, path: str = "") -> Iterator[tuple[str, nn.Module, tuple[Wrapper, ...]]]:
    """(path, module, the wrappers around it from the outside in), with paths as they are without adapters.

    Parents come before their children; a module that is shared comes under each of its paths.
    """
    waiting = [(path, module)]
    while waiting:
        path, module = waiting.pop()
        around: list[Wrapper] = []
        while isinstance(module, Wrapper):
            around.append(module)
            module = module.base
        yield path, module, tuple(around)
        children = module._modules.items()  # pyright: ignore[reportPrivateUsage]  # named_children skips doubles
        below = [(f"{path}.{name}" if path else name, one) for name, one in children if one is not None]
        waiting += reversed(below)


def base_modules(model: nn.Module) -> Iterator[tuple[str, nn.Module]]:
    """(path, module) as they are without adapters; a module that is shared comes under each of its paths."""
    return ((path, module) for path, module, _ in walk(model))


def base_tensors(model: nn.Module) -> Iterator[tuple[str, Tensor]]:
    """The base's parameters and persistent buffers under their own names, adapters or not; tied ones once."""
    seen: set[int] = set()
    for path, module in base_modules(model):
        for name, tensor in module.state_dict(keep_vars=True).items():
            if "." not in name and id(tensor) not in seen:  # a dot: it belongs to a module inside this one
                seen.add(id(tensor))
                yield f"{path}.{name}" if path else name, tensor.detach()
