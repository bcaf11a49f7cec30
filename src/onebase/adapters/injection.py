"""Put adapters on a model, choose one for a call, take them out again: inject, use, extract, eject."""

from __future__ import annotations

import copy
from collections.abc import Generator, Iterable, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from typing import cast

import torch
from torch import Tensor, nn

from onebase.adapters.adapter import Adapter, LayerKind, LowRank, Origin
from onebase.adapters.fitting import fit_problems, sites_of, with_kinds
from onebase.adapters.kinds import Site, is_parameter
from onebase.adapters.layers import (
    ACTIVE,
    LoraLayer,
    ParameterLayer,
    Selection,
    Slot,
    TrainedModule,
    Wrapper,
    bare,
    base_modules,
    base_tensors,
    walk,
)
from onebase.adapters.targets import Coverage, match, names_for
from onebase.adapters.tokens import (
    ID_PREFIX,
    TokenLayer,
    add_tokens,
    start_rows,
    token_ids,
    token_places,
    token_slots,
    token_targets,
)
from onebase.adapters.variants import check_start, is_held, start, stored_config
from onebase.config import LoraConfig
from onebase.errors import AdapterNameError, BaseMismatch, TargetError, nearest

MERGED = "onebase_merged"  # on the model: what unmerge puts back
_ATTRIBUTE = "onebase_adapters"  # on the model: what extract needs besides the tensors


@dataclass(frozen=True)
class _Card:
    config: LoraConfig
    origin: Origin


def new_adapter(
    model: nn.Module,
    config: LoraConfig,
    seed: int = 0,
    origin: Origin | None = None,
    seen: Mapping[str, Tensor] | None = None,
) -> Adapter:
    """A fresh adapter for a model, whose output it leaves as it is. Its config names the modules that were matched.

    `seen` is what a start from data needs (eva, lora_ga): gathered in `calibration.observed`. A start that takes
    something out of W (pissa, olora, lora_ga) gives updates of twice the rank, at the same scale, whose second half
    stays fixed. Raises TargetError where a name, layer or pattern matches nothing, or matches unevenly across
    layers (`adapter_for` takes a coverage as it is), and what `check_start` raises.
    """
    coverage = match(model, config)
    if coverage.uneven:
        raise TargetError(
            "target_modules", "; ".join(coverage.uneven), hint="say which layers are meant: layers=..."
        )
    return adapter_for(model, coverage, config, seed, origin or Origin(), seen or {})


def adapter_for(
    model: nn.Module,
    coverage: Coverage,
    config: LoraConfig,
    seed: int,
    origin: Origin,
    seen: Mapping[str, Tensor],
) -> Adapter:
    """A fresh adapter for targets that were matched before."""
    modules = dict(base_modules(model))
    check_start(config, coverage.targets, modules)
    low = {t.path: start(t, config, seed, modules[t.site.owner], seen.get(t.path)) for t in coverage.targets}
    full = {path: _wide_state(modules[path]) for path in coverage.full}
    names = names_for(model, coverage.targets)
    resolved = replace(
        stored_config(config),
        target_modules=names.modules,
        target_parameters=names.parameters,
        exclude_modules=(),
        layers="",
        modules_to_save=coverage.full,
        trainable_tokens=[f"{ID_PREFIX}{token}" for token in token_ids(config)],
    )
    tokens = {
        path: start_rows(modules[path], ids, origin.tokens.values())
        for path, ids in token_targets(model, config).items()
    }
    return Adapter(resolved, low, full, origin, tokens)


def _wide_state(module: nn.Module) -> dict[str, Tensor]:
    return {name: tensor.to(torch.float32, copy=True) for name, tensor in base_tensors(module)}


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
    sites = sites_of(model, adapter)
    _wrap(model, adapter, sites.values())
    add_tokens(model, name, adapter.tokens)
    adapter = with_kinds(model, adapter)
    wrappers = {(path, type(wrapper)): wrapper for path, wrapper in _wrappers(model)}
    for path, site in sites.items():
        slot = Slot(adapter.lowrank[path], adapter.config.dropout, is_held(adapter.config))
        if is_parameter(site.kind):
            cast("ParameterLayer", wrappers[site.owner, ParameterLayer]).add(name, site.name, slot)
        else:
            cast("LoraLayer", wrappers[site.owner, LoraLayer]).add(name, slot)
    for path, state in adapter.full.items():
        stand = cast("TrainedModule", wrappers[path, TrainedModule])
        stand.add(name, _stand_in(bare(stand), state))
    model.__dict__[_ATTRIBUTE] = _cards(model) | {name: _Card(adapter.config, adapter.origin)}
    return model


def _wrap(model: nn.Module, adapter: Adapter, sites: Iterable[Site]) -> None:
    """Wrap what the adapter touches and nothing has yet: updates inside, a stand-in around them, token rows outside."""
    owners: dict[tuple[str, bool], LayerKind] = {
        (site.owner, is_parameter(site.kind)): site.kind for site in sites
    }
    layers = {
        inner: LoraLayer(inner, kind).train(module.training)
        for path, module, around in walk(model)
        if (kind := owners.get((path, False))) and not _has(around, LoraLayer)
        for inner in [one for one in (*around, module) if isinstance(one, ParameterLayer) or one is module][
            :1
        ]
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
        for outer in [one for one in (*around, module) if not isinstance(one, TokenLayer)][:1]
    }
    _replace(model, stands)
    places = token_places(dict(base_modules(model)), adapter.tokens)
    tokens = {
        outer: TokenLayer(outer).train(outer.training)
        for path, module, around in walk(model)
        if path in places and not _has(around, TokenLayer)
        for outer in (around or (module,))[:1]
    }
    _replace(model, tokens)


def _has(around: Sequence[Wrapper], kind: type[Wrapper]) -> bool:
    return any(isinstance(wrapper, kind) for wrapper in around)


def _stand_in(base: nn.Module, state: Mapping[str, Tensor]) -> nn.Module:
    twin = copy.deepcopy(base).to(torch.float32)
    _replace(twin, {wrapper: wrapper.base for _, wrapper in _wrappers(twin)})
    if isinstance(twin, nn.Embedding | nn.Linear) and (rows := len(state["weight"])) != len(twin.weight):
        for name, tensor in state.items():  # the vocabulary has grown
            setattr(twin, name, nn.Parameter(torch.empty_like(tensor), False))
        setattr(twin, "num_embeddings" if isinstance(twin, nn.Embedding) else "out_features", rows)
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
    found |= {f"{path}.rows": slot.rows for path, slot in token_slots(model, name).items()}
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
    tokens = {path: slot.tokens() for path, slot in token_slots(model, name).items()}
    return Adapter(card.config, low, full, card.origin, tokens)


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
