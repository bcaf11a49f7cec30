"""Put adapters on a model, choose one for a call, take them out again: inject, use, extract, eject."""

from __future__ import annotations

import copy
from collections.abc import Generator, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from typing import cast

import torch
from torch import Tensor, nn

from onebase.adapter import Adapter, LayerKind, LowRank, Origin
from onebase.config import LoraConfig
from onebase.errors import AdapterNameError, BaseMismatch, TargetError, nearest
from onebase.kinds import Site, Target, find_site, is_parameter
from onebase.layers import (
    ACTIVE,
    LoraLayer,
    ParameterLayer,
    Selection,
    Slot,
    TrainedModule,
    Wrapper,
    bare,
    base_modules,
    walk,
)
from onebase.targets import Coverage, match, name_matches
from onebase.variants import start

MERGED = "onebase_merged"  # on the model: what unmerge puts back
_ATTRIBUTE = "onebase_adapters"  # on the model: what extract needs besides the tensors


@dataclass(frozen=True)
class _Card:
    config: LoraConfig
    origin: Origin


def new_adapter(model: nn.Module, config: LoraConfig, seed: int = 0, origin: Origin | None = None) -> Adapter:
    """A fresh adapter for a model, whose B·A is 0. Its config names the modules that were matched.

    Raises TargetError where a name, layer or pattern matches nothing, or matches unevenly across layers
    (`adapter_for` takes a coverage as it is).
    """
    coverage = match(model, config)
    if coverage.uneven:
        raise TargetError(
            "target_modules", "; ".join(coverage.uneven), hint="say which layers are meant: layers=..."
        )
    return adapter_for(model, coverage, config, seed, origin or Origin())


def adapter_for(
    model: nn.Module, coverage: Coverage, config: LoraConfig, seed: int, origin: Origin
) -> Adapter:
    """A fresh adapter for targets that were matched before."""
    low = {t.path: start(t, config.init, seed) for t in coverage.targets}
    modules = dict(base_modules(model))
    full = {path: _wide_state(modules[path]) for path in coverage.full}
    names = _names_for(model, coverage.targets)
    resolved = replace(
        config, target_modules=names, exclude_modules=(), layers="", modules_to_save=coverage.full
    )
    return Adapter(resolved, low, full, origin)


def _wide_state(module: nn.Module) -> dict[str, Tensor]:
    return {name: tensor.to(torch.float32, copy=True) for name, tensor in base_tensors(module)}


def _names_for(model: nn.Module, targets: Sequence[Target]) -> tuple[str, ...]:
    """Short names where they mean exactly these modules to every reader, else the full paths."""
    wanted = {t.path for t in targets}
    short = tuple(sorted({path.rsplit(".", 1)[-1] for path in wanted}))
    meant = {path for path, _ in base_modules(model) if any(name_matches(name, path) for name in short)}
    return short if meant == wanted else tuple(sorted(wanted))


def adapter_names(model: nn.Module) -> list[str]:
    """The names of the adapters that a model carries."""
    return list(_cards(model))


def _cards(model: nn.Module) -> dict[str, _Card]:
    return model.__dict__.get(_ATTRIBUTE, {})


def _replace(model: nn.Module, twins: Mapping[nn.Module, nn.Module]) -> None:
    """Put each module's twin, or its twin's twin, wherever the module stands: a shared one in several places."""
    for parent in list(model.modules()):
        for name, child in list(parent._modules.items()):  # pyright: ignore[reportPrivateUsage]  # named_children skips doubles
            new = child
            while new is not None and new in twins:
                new = twins[new]
            if new is not child:
                setattr(parent, name, new)


def inject(model: nn.Module, adapter: Adapter, name: str = "default") -> nn.Module:
    """Put an adapter on a model, in place, beside those already there; `use` then chooses it.

    Returns the model. Nothing of the base is written to; the adapter's tensors are copied. Raises BaseMismatch
    that lists every module that is missing or has another shape; the model is unchanged then.
    """
    if name in _cards(model):
        raise AdapterNameError(f"inject adapter {name!r}", "the model already carries one of that name")
    if MERGED in vars(model):
        raise AdapterNameError(
            f"inject adapter {name!r}", "another is merged into the model", hint="unmerge first"
        )
    problems = fit_problems(model, adapter)
    if problems:
        shown = [*problems[:20], *([f"... and {len(problems) - 20} more"] if len(problems) > 20 else [])]
        raise BaseMismatch(f"adapter {name!r} does not fit this base", "\n  " + "\n  ".join(shown))
    sites = _sites(model, adapter)
    _wrap(model, adapter, sites.values())
    adapter = with_kinds(model, adapter)
    wrappers = {(path, type(wrapper)): wrapper for path, wrapper in _wrappers(model)}
    for path, site in sites.items():
        slot = Slot(adapter.lowrank[path], adapter.config.dropout)
        if is_parameter(site.kind):
            cast("ParameterLayer", wrappers[site.owner, ParameterLayer]).add(name, site.name, slot)
        else:
            cast("LoraLayer", wrappers[site.owner, LoraLayer]).add(name, slot)
    for path, state in adapter.full.items():
        stand = cast("TrainedModule", wrappers[path, TrainedModule])
        stand.add(name, _stand_in(bare(stand), state))
    model.__dict__[_ATTRIBUTE] = _cards(model) | {name: _Card(adapter.config, adapter.origin)}
    return model


def _sites(model: nn.Module, adapter: Adapter) -> dict[str, Site]:
    """Where each update goes; those that the base has no place for are left out."""
    modules = dict(base_modules(model))
    found = {path: find_site(modules, path) for path in adapter.lowrank}
    return {path: site for path, site in found.items() if site}


def fit_problems(model: nn.Module, adapter: Adapter) -> list[str]:
    """Why an adapter does not fit a model: a sentence for each module, none where it fits."""
    modules = dict(base_modules(model))
    found = [_low_problem(modules, path, low) for path, low in adapter.lowrank.items()]
    for path, state in adapter.full.items():
        own = base_tensors(modules[path]) if path in modules else ()
        shapes = {n: tuple(t.shape) for n, t in state.items()}
        if shapes != (has := {n: tuple(t.shape) for n, t in own}):
            found.append(f"{path}: the adapter holds {shapes}, the base {has or 'no such module'}")
    return [problem for problem in found if problem]


def with_kinds(model: nn.Module, adapter: Adapter) -> Adapter:
    """The adapter with each update's kind as the base has it: a file has one flag for all of its layers."""
    sites = _sites(model, adapter)
    low = {
        path: low._replace(kind=sites[path].kind) if path in sites else low
        for path, low in adapter.lowrank.items()
    }
    return replace(adapter, lowrank=low)


def _low_problem(modules: Mapping[str, nn.Module], path: str, low: LowRank) -> str:
    site = find_site(modules, path)
    if site is None:
        if path not in modules:
            return f"{path}: the base has no such module"
        return f"{path}: the base has a {type(modules[path]).__name__}, which carries no update"
    alike = {"linear": "matrix", "transposed": "matrix"}
    if alike.get(site.kind, site.kind) != alike.get(low.kind, low.kind):
        has = type(modules[site.owner]).__name__
        return f"{path}: the base has a {has}, the adapter is for a layer of kind {low.kind}"
    (features, out), blocks = site.shape, site.blocks
    has = (out, features, blocks, site.kernel)
    want = (low.B.shape[0] // low.blocks, low.A.shape[1], low.blocks, low.kernel)
    return "" if has == want else f"{path}: the base's weight is {_size(has)}, the adapter's {_size(want)}"


def _size(shape: tuple[int, int, int, tuple[int, ...]]) -> str:
    out, features, blocks, kernel = shape
    more = f", {blocks} times" if blocks > 1 else ""
    return f"{out} x {features}{more}{f' (kernel {kernel})' if kernel else ''}"


def _wrap(model: nn.Module, adapter: Adapter, sites: Iterable[Site]) -> None:
    """Wrap what the adapter touches and nothing has wrapped yet: updates inside, a stand-in around them."""
    owners: dict[tuple[str, bool], LayerKind] = {
        (site.owner, is_parameter(site.kind)): site.kind for site in sites
    }
    layers = {
        module: LoraLayer(module, kind).train(module.training)
        for path, module, around in walk(model)
        if (kind := owners.get((path, False))) and not _has(around, LoraLayer)
    }
    _replace(model, layers)
    parameters = {
        module: ParameterLayer(module).train(module.training)
        for path, module, around in walk(model)
        if (path, True) in owners and not _has(around, ParameterLayer)
    }
    _replace(model, parameters)
    stands = {
        outer: TrainedModule(outer).train(outer.training)
        for path, module, around in walk(model)
        if path in adapter.full and not _has(around, TrainedModule)
        for outer in (around or (module,))[:1]
    }
    _replace(model, stands)


def _has(around: Sequence[Wrapper], kind: type[Wrapper]) -> bool:
    return any(isinstance(wrapper, kind) for wrapper in around)


def _stand_in(base: nn.Module, state: Mapping[str, Tensor]) -> nn.Module:
    twin = copy.deepcopy(base).to(torch.float32)
    _replace(twin, {wrapper: wrapper.base for _, wrapper in _wrappers(twin)})
    twin.load_state_dict(state, strict=False)  # fit_problems compared the names; tied ones come once
    return twin


def trainable(model: nn.Module, name: str) -> dict[str, nn.Parameter]:
    """An adapter's parameters on a model, by the names of `Adapter.tensors`, sorted."""
    _require(model, name)
    found = {
        f"{p}.{key}": t
        for p, slot in _slots(model, name).items()
        for key, t in slot.named_parameters(recurse=False)
    }
    for path, twin in _copies(model, name).items():
        found |= {f"{path}.{key}": parameter for key, parameter in twin.named_parameters()}
    return dict(sorted(found.items()))


def _slots(model: nn.Module, name: str) -> dict[str, Slot]:
    """An adapter's slots by the paths of its updates."""
    found: dict[str, Slot] = {}
    for path, wrapper in _wrappers(model):
        if isinstance(wrapper, LoraLayer) and (slot := wrapper.slot(name)) is not None:
            found[path] = slot
        elif isinstance(wrapper, ParameterLayer):
            found |= {f"{path}.{key}" if path else key: s for key, s in (wrapper.slot(name) or {}).items()}
    return found


def _copies(model: nn.Module, name: str) -> dict[str, nn.Module]:
    """The modules that an adapter trains in full, by path."""
    found = {path: w.copy(name) for path, w in _wrappers(model) if isinstance(w, TrainedModule)}
    return {path: twin for path, twin in found.items() if twin is not None}


def _wrappers(model: nn.Module) -> list[tuple[str, Wrapper]]:
    """Every wrapper once, under its module's first path in the base."""
    found: dict[Wrapper, str] = {}
    for path, _, around in walk(model):
        for wrapper in around:
            found.setdefault(wrapper, path)
    return [(path, wrapper) for wrapper, path in found.items()]


def _require(model: nn.Module, name: str) -> None:
    if name not in _cards(model):
        raise AdapterNameError(
            f"adapter {name!r}", "the model carries no adapter of that name", nearest(name, _cards(model))
        )


def extract(model: nn.Module, name: str = "default") -> Adapter:
    """The adapter as it is on the model now, as a value of its own: `extract(inject(m, a)) == a`."""
    _require(model, name)
    card = _cards(model)[name]
    low = {path: _detached(slot.low()) for path, slot in _slots(model, name).items()}
    full = {
        path: {key: t.cpu().clone() for key, t in base_tensors(twin)}
        for path, twin in _copies(model, name).items()
    }
    return Adapter(card.config, low, full, card.origin)


def _detached(low: LowRank) -> LowRank:
    return low._replace(**{name: tensor.detach().cpu().clone() for name, tensor in low.tensors().items()})


def eject(model: nn.Module, names: Iterable[str] | None = None) -> nn.Module:
    """Take adapters off a model (all by default). With none left it is the very model it was before."""
    names = adapter_names(model) if names is None else list(names)
    for name in names:
        _require(model, name)
        for _, module in _wrappers(model):
            if (module.copy if isinstance(module, TrainedModule) else module.slot)(name) is not None:
                module.remove(name)
    idle = [m for _, m in _wrappers(model) if not (m.copies if isinstance(m, TrainedModule) else m.slots)]
    _replace(model, {module: module.base for module in idle})
    left = {name: card for name, card in _cards(model).items() if name not in names}
    model.__dict__.pop(_ATTRIBUTE, None)
    if left:
        model.__dict__[_ATTRIBUTE] = left
    return model


@contextmanager
def use(model: nn.Module, name: str | Sequence[str | None] | None = "default") -> Generator[nn.Module]:
    """Choose, for the calls inside the `with`, one adapter, none (the plain base), or one for each row of the batch.

    The choice belongs to this thread and context alone. Raises AdapterNameError with the nearest names.
    """
    rows = None if name is None or isinstance(name, str) else tuple(name)
    for wanted in rows if rows is not None else (name,):
        if isinstance(wanted, str):
            _require(model, wanted)
    token = ACTIVE.set(Selection(name if isinstance(name, str) else None, rows))
    try:
        yield model
    finally:
        ACTIVE.reset(token)


@contextmanager
def injected(model: nn.Module, adapter: Adapter | None, name: str = "default") -> Generator[nn.Module]:
    """The model, in eval mode, with this adapter on it and chosen (None: the plain base), and then as before."""
    with eval_mode(model):
        if adapter is None:
            with use(model, None):
                yield model
            return
        inject(model, adapter, name)
        try:
            with use(model, name):
                yield model
        finally:
            eject(model, [name])


@contextmanager
def eval_mode(model: nn.Module) -> Generator[None]:
    """The model in eval mode, and each module's own mode again afterwards."""
    before = [(module, module.training) for module in model.modules()]
    model.eval()
    try:
        yield
    finally:
        for module, mode in before:
            module.training = mode


@contextmanager
def adapter_dropout(model: nn.Module) -> Generator[None]:
    """Adapters drop out inside; the base stays in eval mode, for a frozen base is not regularised."""
    layers = [module for _, module in _wrappers(model)]
    before = [layer.training for layer in layers]
    try:
        for layer in layers:
            layer.training = True
        yield
    finally:
        for layer, mode in zip(layers, before, strict=True):
            layer.training = mode


def base_tensors(model: nn.Module) -> Iterator[tuple[str, Tensor]]:
    """The base's parameters and persistent buffers under their own names, adapters or not; tied ones once."""
    seen: set[int] = set()
    for path, module in base_modules(model):
        for name, tensor in module.state_dict(keep_vars=True).items():
            if "." not in name and id(tensor) not in seen:  # a dot: it belongs to a module inside this one
                seen.add(id(tensor))
                yield f"{path}.{name}" if path else name, tensor.detach()
