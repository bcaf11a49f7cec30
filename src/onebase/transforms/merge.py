"""An adapter made part of the weights: a checked plan for a stored base, or in memory with an exact way back."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Generator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from onebase.adapters.adapter import Adapter, LowRank, TokenRows
from onebase.adapters.injection import MERGED, adapter_names, fit_problems, with_kinds
from onebase.adapters.kinds import find_site, merged_weight
from onebase.adapters.layers import base_modules
from onebase.adapters.tokens import growth_problems, token_places
from onebase.errors import AdapterNameError, BaseError, BaseMismatch
from onebase.storage.shards import TensorInfo

FLOATS = ("F64", "F32", "F16", "BF16")


class Shift(NamedTuple):
    """What is added to a bias."""

    by: Tensor


class Rows(NamedTuple):
    """Token rows that take the place of a weight's own, or stand behind them, once `under` was added to the rest."""

    tokens: TokenRows
    under: LowRank | None = None

    def shape(self, before: Sequence[int]) -> tuple[int, ...]:
        """The merged weight's."""
        return max([before[0], *(token + 1 for token in self.tokens.ids)]), *before[1:]

    def part(self, start: int, end: int) -> TokenRows:
        """The rows of the ids in [start, end), in their order and counted from `start`."""
        ids, rows = self.tokens
        places = sorted((token, place) for place, token in enumerate(ids) if start <= token < end)
        return TokenRows(tuple(token - start for token, _ in places), rows[[place for _, place in places]])


Direct = LowRank | Tensor | Shift | Rows
"""What happens to a parameter: an update or a vector is added, another tensor or other rows take its place."""


class Fusion(NamedTuple):
    """Parameters that are made of other stored tensors, such as a stack of experts that are stored one by one.

    `join` makes the parameters of the stored tensors, `split` the stored tensors of the parameters; both go by name
    and work on meta tensors too.
    """

    sources: tuple[str, ...]
    parameters: tuple[str, ...]
    join: Callable[[Mapping[str, Tensor]], Mapping[str, Tensor]]
    split: Callable[[Mapping[str, Tensor]], Mapping[str, Tensor]]


class Fused(NamedTuple):
    """Changes of parameters that are stored in pieces; all the pieces share it."""

    fusion: Fusion
    sources: tuple[TensorInfo, ...]
    changes: Mapping[str, Direct]


Change = Direct | Fused | None
"""What happens to a stored tensor; None: nothing."""


@dataclass(frozen=True)
class Skeleton:
    """A model folder without its weights: the modules, and where each parameter is stored."""

    folder: Path
    model: nn.Module  # on the meta device
    tensors: tuple[TensorInfo, ...]
    stored: Mapping[str, str]  # parameter -> the stored tensor that it is loaded from as it stands
    ties: Mapping[str, str]  # parameter -> the one whose weight it shares
    unties: bool  # whether its configuration should say that weights which were tied are so no longer
    fingerprint: str
    fusions: tuple[Fusion, ...] = ()  # for the parameters that are loaded otherwise

    def for_adapter(self, adapter: Adapter) -> Skeleton:
        """The skeleton itself. Raises BaseError for an adapter whose head the model folder has no place for, or one
        that makes vectors with a decoder, whose own modules have other paths."""
        paths = {path for path, _ in base_modules(self.model)}
        lacking = set(adapter.full) - paths
        if adapter.origin.embeds and not adapter.lowrank.keys() <= paths:
            found = "the adapter is for the model below the output head, and these files hold both"
            hint = "use base and adapter as they are: onebase embed, or PEFT's merge_and_unload"
            raise BaseError(f"merge into {self.folder}", found, hint=hint)
        if lacking:
            found = f"{', '.join(sorted(lacking))} belongs to its head, and the base's files hold none"
            hint = "use base and adapter as they are: onebase predict, or PEFT's merge_and_unload"
            raise BaseError(f"merge into {self.folder}", found, hint=hint)
        return self


class Part(NamedTuple):
    """One tensor of the merged model: its name, the stored tensor that it comes from, and the change."""

    name: str
    source: TensorInfo
    change: Change = None

    @property
    def shape(self) -> tuple[int, ...]:
        """The merged tensor's; one that takes another's place may have more rows."""
        if isinstance(self.change, Rows):
            return self.change.shape(self.source.shape)
        return tuple(self.change.shape) if isinstance(self.change, Tensor) else self.source.shape


@dataclass(frozen=True)
class MergePlan:
    """A merge that was checked: every tensor of the output, and what changes in its configuration."""

    folder: Path
    parts: tuple[Part, ...]
    settings: Mapping[str, Any] = field(default_factory=dict[str, Any])
    files: Mapping[str, bytes] = field(default_factory=dict[str, bytes])  # its own, not the base's

    @property
    def changed(self) -> int:
        """The number of tensors that differ from the base's."""
        return sum(part.change is not None for part in self.parts)

    @property
    def untied(self) -> tuple[str, ...]:
        """The weights that are stored apart from the one that the base ties them to."""
        return tuple(part.name for part in self.parts if part.name != part.source.name)


def make_plan(base: Skeleton, adapter: Adapter) -> MergePlan:
    """What merging means for each stored tensor. Raises BaseMismatch that lists everything that does not fit.

    Where an adapter changes one of several tied weights (an embedding and not the head, say), the output holds
    each that differs, and its configuration says that they are no longer tied. T5 and its like have no such setting,
    or also scale by it: transformers unties what it finds stored apart. Token rows change all of them alike.
    """
    if problems := merge_problems(base.model, adapter):
        raise _misfit(base, problems)
    changes = _changes(base.model, adapter)
    fused = {name: fusion for fusion in base.fusions for name in fusion.parameters if name in changes}
    infos = {info.name: info for info in base.tensors}
    shapes = {name: tuple(tensor.shape) for name, tensor in base.model.state_dict().items()}
    groups = _tied_groups(base)
    alike = [group for group in groups if len({id(changes.get(name)) for name in group}) == 1]
    loose = [group for group in groups if group not in alike]
    followers = {name for group in alike for name in group if name not in base.stored}
    plain = [name for name in changes if name not in fused and name not in followers]
    apart = [name for group in loose for name in group if _needs_own(name, group[0], base, changes)]
    owners = {name: _owner(name, base, groups) for name in [*plain, *apart]}
    problems = [
        text for name in plain if (text := _stored_problem(name, infos.get(owners[name]), shapes[name]))
    ]
    problems += [text for fusion in fused.values() for text in _fusion_problems(fusion, infos, shapes)]
    if problems:
        raise _misfit(base, problems)
    parts = {info.name: Part(info.name, info) for info in base.tensors}
    for name, owner in owners.items():
        own = base.stored.get(name, name)
        parts[own] = Part(own, infos[owner], changes.get(name))
    parts |= {part.name: part for part in _fused_parts(fused, changes, infos)}
    settings: dict[str, Any] = {"tie_word_embeddings": False} if loose and base.unties else {}
    if sizes := [part.shape[0] for part in parts.values() if isinstance(part.change, Rows)]:
        settings["vocab_size"] = max(sizes)
    return MergePlan(base.folder, tuple(parts.values()), settings)


def _misfit(base: Skeleton, problems: Sequence[str]) -> BaseMismatch:
    found = "\n  " + "\n  ".join(sorted(set(problems)))
    return BaseMismatch(f"the adapter cannot be merged into {base.folder}", found)


def merge_problems(model: nn.Module, adapter: Adapter) -> list[str]:
    """Why an adapter cannot be merged into a model: a sentence for each module, none where it can."""
    if problems := fit_problems(model, adapter):
        return problems
    modules = dict(base_modules(model))
    if problems := growth_problems(model, adapter.tokens):
        return problems
    biased = {path: modules[path] for path, low in adapter.lowrank.items() if low.bias is not None}
    return [
        f"{path}: the adapter moves its bias, and the {type(module).__name__} has none to merge that into"
        for path, module in biased.items()
        if getattr(module, "bias", None) is None
    ]


def _changes(model: nn.Module, adapter: Adapter) -> dict[str, Direct]:
    """What happens to each parameter of the model, by its full name."""
    modules = dict(base_modules(model))
    changes: dict[str, Direct] = {}
    for path, low in with_kinds(model, adapter).lowrank.items():
        site = find_site(modules, path)
        assert site is not None  # merge_problems has named it
        changes[site.tensor] = low
        if low.bias is not None:
            changes[f"{path}.bias"] = Shift(low.scale * low.bias)
    shared = {path: Rows(tokens) for path, tokens in adapter.tokens.items()}
    for place, path in token_places(modules, adapter.tokens).items():
        under = changes.get(f"{place}.weight")
        changes[f"{place}.weight"] = shared[path]._replace(under=under) if under else shared[path]
    return changes | {f"{path}.{n}": t for path, state in adapter.full.items() for n, t in state.items()}


def _fused_parts(
    fused: Mapping[str, Fusion],
    changes: Mapping[str, Direct],
    infos: Mapping[str, TensorInfo],
) -> list[Part]:
    """The pieces of the parameters that are stored in pieces."""
    parts: list[Part] = []
    for fusion in {fusion.parameters: fusion for fusion in fused.values()}.values():
        own = {name: changes[name] for name in fusion.parameters if name in changes}
        change = Fused(fusion, tuple(infos[name] for name in fusion.sources), own)
        parts += [Part(info.name, info, change) for info in change.sources]
    return parts


def _tied_groups(base: Skeleton) -> list[list[str]]:
    groups: defaultdict[str, list[str]] = defaultdict(list)
    for name, source in base.ties.items():
        groups[source] = [*(groups[source] or [source]), name]
    return list(groups.values())


def _needs_own(name: str, source: str, base: Skeleton, changes: Mapping[str, Direct]) -> bool:
    """Whether a weight that was tied to `source` is stored apart: a missing one is tied to it on loading."""
    return name in (source, *base.stored) or changes.get(name) is not changes.get(source)


def _owner(name: str, base: Skeleton, groups: Sequence[Sequence[str]]) -> str:
    """The stored tensor that a parameter is loaded from: its own, or that of one it is tied to; else empty."""
    group = next((group for group in groups if name in group), ())
    return next((base.stored[one] for one in (name, *group) if one in base.stored), "")


def stored_name(base: Skeleton, name: str) -> str:
    """The stored tensor that a parameter is loaded from as it stands, its own or a tied one's; empty if none is."""
    return _owner(name, base, _tied_groups(base))


def _stored_problem(name: str, info: TensorInfo | None, shape: tuple[int, ...]) -> str:
    if info is None:
        return f"{name}: the base's files hold no tensor for it"
    if info.dtype not in FLOATS:
        return _not_a_float(name, info)
    return (
        ""
        if shape == info.shape
        else f"{name}: stored with shape {info.shape}, the configuration says {shape}"
    )


def _fusion_problems(
    fusion: Fusion, infos: Mapping[str, TensorInfo], shapes: Mapping[str, tuple[int, ...]]
) -> list[str]:
    """Whether the pieces make the parameters and the parameters the pieces, as far as shapes can tell."""
    pieces = [infos[name] for name in fusion.sources]
    if odd := [_not_a_float(info.name, info) for info in pieces if info.dtype not in FLOATS]:
        return odd
    stored = {info.name: torch.empty(info.shape, device="meta") for info in pieces}
    try:
        whole = fusion.join(stored)
        back = {name: tuple(tensor.shape) for name, tensor in fusion.split(whole).items()}
        made = {name: tuple(tensor.shape) for name, tensor in whole.items()}
    except Exception as error:  # transformers' converters fail in their own ways
        return [
            f"{name}: stored in {len(pieces)} pieces that do not fit it ({error})"
            for name in fusion.parameters
        ]
    if made == {name: shapes[name] for name in made} and back == {info.name: info.shape for info in pieces}:
        return []
    return [
        f"{name}: stored in {len(pieces)} pieces that do not make it and are not made of it" for name in made
    ]


def _not_a_float(name: str, info: TensorInfo) -> str:
    return f"{name}: stored as {info.dtype}, which cannot carry an update"


def changed_tensor(weight: Tensor, change: Direct, in_place: bool = False) -> Tensor:
    """The merged tensor: computed in float32 (float64 for float64), cast once to the weight's dtype.

    `in_place`: the weight's memory may become the result's, which saves a copy.
    """
    if isinstance(change, Tensor):
        return change.to(weight.device, weight.dtype, copy=True)
    if isinstance(change, Shift):
        wide = torch.promote_types(weight.dtype, torch.float32)
        return (weight.detach().to(wide) + change.by.to(weight.device)).to(weight.dtype)
    if isinstance(change, Rows):
        return _with_rows(weight.detach(), change)
    here = {name: tensor.to(weight.device) for name, tensor in change.tensors().items()}
    return merged_weight(weight.detach(), change._replace(**here), in_place).contiguous()


def _with_rows(weight: Tensor, change: Rows) -> Tensor:
    result = weight if change.under is None else changed_tensor(weight, change.under)
    known, new = change.part(0, len(weight)), change.part(len(weight), change.shape(weight.shape)[0])
    ids = torch.tensor(known.ids, dtype=torch.int64, device=weight.device)
    result = result.index_copy(0, ids, known.rows.to(weight))
    return torch.cat([result, new.rows.to(weight)])


class _Swap(NamedTuple):
    module: nn.Module
    name: str
    original: Tensor


def merge_in_memory(model: nn.Module, adapter: Adapter) -> nn.Module:
    """Give the adapted layers new weights W + s·B·A, so that the adapter costs nothing; `unmerge` undoes it.

    Returns the model. The base's own tensors are set aside, not written to: they may be memory-mapped, or tied
    to a layer that the adapter leaves alone. Memory: one copy of the adapted layers. Raises BaseMismatch, or
    AdapterNameError where the model already carries adapters, whose updates would be added to the merged weights.
    """
    carried = ["a merged one"] if MERGED in vars(model) else adapter_names(model)
    if carried:
        found = "the model already carries " + ", ".join(carried)
        raise AdapterNameError("merge in memory", found, hint="unmerge or eject first")
    if problems := merge_problems(model, adapter):
        raise BaseMismatch("the adapter cannot be merged into this base", "\n  " + "\n  ".join(problems))
    modules, swaps = dict(base_modules(model)), list[_Swap]()
    made: dict[tuple[int, int], Tensor] = {}  # tied weights that change alike stay one tensor
    model.__dict__[MERGED] = swaps
    try:
        for name, change in _changes(model, adapter).items():
            path, _, end = name.rpartition(".")
            swaps.append(swap := _Swap(modules[path], end, getattr(modules[path], end)))
            if (key := (id(swap.original), id(change))) not in made:
                made[key] = changed_tensor(swap.original, change)
            _put(swap, made[key])
    except BaseException:  # out of memory, for example
        unmerge(model)
        raise
    return model


def _put(swap: _Swap, value: Tensor) -> None:
    parameter = isinstance(swap.original, nn.Parameter) and not isinstance(value, nn.Parameter)
    setattr(swap.module, swap.name, nn.Parameter(value, requires_grad=False) if parameter else value)


def unmerge(model: nn.Module) -> nn.Module:
    """Put the base's own tensors back: the very same objects, so every bit and every tie is as before."""
    if MERGED not in vars(model):
        raise AdapterNameError("unmerge", "no adapter is merged into this model")
    for swap in model.__dict__.pop(MERGED):
        _put(swap, swap.original)
    return model


@contextmanager
def merged(model: nn.Module, adapter: Adapter) -> Generator[nn.Module]:
    """The model with this adapter in its weights, and as before afterwards."""
    merge_in_memory(model, adapter)
    try:
        yield model
    finally:
        unmerge(model)
