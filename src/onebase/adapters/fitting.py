"""Whether an adapter fits a model, and where its updates go there."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace

from torch import Tensor, nn

from onebase.adapters.adapter import Adapter, LowRank
from onebase.adapters.kinds import Site, find_site, why_not
from onebase.adapters.layers import base_modules, base_tensors
from onebase.adapters.targets import adaptable, output_head
from onebase.adapters.tokens import token_problems


class Places:
    """A base's modules, and the sites for updates among them, looked up once. The base's modules must stay."""

    def __init__(self, model: nn.Module) -> None:
        self.model, self.modules, self.adaptable = model, dict(base_modules(model)), adaptable(model)

    def site(self, path: str) -> Site | None:
        """The site of this path, a module's or a parameter's full name."""
        return self.adaptable.get(path) or find_site(self.modules, path)


def places_of(model: nn.Module | Places) -> Places:
    """A model's places, looked up now unless they were before."""
    return model if isinstance(model, Places) else Places(model)


def sites_of(model: nn.Module | Places, adapter: Adapter) -> dict[str, Site]:
    """Where each update goes; those that the base has no place for are left out."""
    places = places_of(model)
    found = {path: places.site(path) for path in adapter.lowrank}
    return {path: site for path, site in found.items() if site}


def with_kinds(model: nn.Module | Places, adapter: Adapter) -> Adapter:
    """The adapter with each update's kind as the base has it: a file has one flag for all of its layers."""
    sites = sites_of(model, adapter)
    low = {
        path: low._replace(kind=sites[path].kind) if path in sites and low.kind != sites[path].kind else low
        for path, low in adapter.lowrank.items()
    }
    return replace(adapter, lowrank=low)


def fit_problems(model: nn.Module | Places, adapter: Adapter) -> list[str]:
    """Why an adapter does not fit a model: a sentence for each module, none where it fits."""
    places = places_of(model)
    modules, head = places.modules, output_head(places.model)
    found = [_low_problem(places, path, low) for path, low in adapter.lowrank.items()]
    for path, state in adapter.full.items():
        module = modules.get(path)
        own = {} if module is None else {n: tuple(t.shape) for n, t in base_tensors(module)}
        shapes = {n: tuple(t.shape) for n, t in state.items()}
        if shapes != own and not ((module is head or isinstance(module, nn.Embedding)) and _grew(state, own)):
            found.append(f"{path}: the adapter holds {shapes}, the base {own or 'no such module'}")
    return [problem for problem in found if problem] + token_problems(modules, adapter)


def _grew(state: Mapping[str, Tensor], own: Mapping[str, tuple[int, ...]]) -> bool:
    """Whether an embedding or head is the base's but for more rows: tokens were added to the vocabulary."""
    if state.keys() != own.keys() or any(t.shape[1:] != own[name][1:] for name, t in state.items()):
        return False
    return {len(t) for t in state.values()} == {len(state["weight"])} and len(state["weight"]) > own[
        "weight"
    ][0]


def _low_problem(places: Places, path: str, low: LowRank) -> str:
    site, modules = places.site(path), places.modules
    if site is None:
        if path not in modules:
            return f"{path}: the base has no such module"
        return f"{path}: the base has {why_not(modules[path])}"
    # How the base stores a weight is not said in a file.
    alike = {"transposed": "linear", "parameter_transposed": "parameter"}
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
