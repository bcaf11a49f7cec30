"""What a check is given and what it says: the case, its modules in numbers, and findings."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from functools import cached_property
from typing import Any, Literal, NamedTuple, Protocol

import torch
from torch import Tensor, nn

from onebase.adapters.adapter import LowRank, Origin
from onebase.adapters.kinds import Site, find_site
from onebase.adapters.layers import base_modules
from onebase.diagnosis.measures import Effect, Spectrum, change, spectrum
from onebase.diagnosis.salvage import Salvage
from onebase.ops.lowrank import finite_scale

Severity = Literal["error", "warning", "fine", "skipped"]


class Finding(NamedTuple):
    """What a check saw. `skipped` means that it could not be made; `facts` are its numbers, for JSON."""

    severity: Severity
    found: str
    advice: str = ""
    facts: Mapping[str, Any] = {}


class HasBase(Protocol):
    """What the checks read of a base."""

    @property
    def model(self) -> nn.Module: ...
    @property
    def tokenizer(self) -> Any | None: ...
    @property
    def name(self) -> str: ...
    @property
    def fingerprint(self) -> str: ...
    @property
    def dtype(self) -> str: ...


class Module(NamedTuple):
    """One update in numbers; None where it cannot be told."""

    path: str
    kind: str
    rank: int
    scale: float
    largest: float  # the largest absolute value in A and B; NaN or infinite where one is
    spectrum: Spectrum | None  # of s·B·A; None where a value is not finite
    norm: float | None  # of W' - W: that of s·B·A, but with DoRA
    ratio: float | None  # norm over |W|

    @property
    def idle(self) -> bool:
        """Whether B·A is 0."""
        return self.spectrum is not None and self.spectrum.norm == 0.0


@dataclass(frozen=True)
class Case:
    """An adapter folder, the base that it is to be used with (None: none given), and what it does to prompts.

    `untried` says why there is no effect to look at.
    """

    files: Salvage
    base: HasBase | None = None
    effect: Effect | None = None
    untried: str = "no base was given"

    @property
    def origin(self) -> Origin:
        """Where the adapter came from, as far as it was recorded."""
        if self.files.stored is not None:
            return self.files.stored.adapter.origin
        name = self.files.raw.get("base_model_name_or_path")
        return Origin(base=name if isinstance(name, str) else "")

    @cached_property
    def sites(self) -> dict[str, Site]:
        """Every place that the base has for the updates, by path."""
        modules = self.base_modules
        found = {path: find_site(modules, path) for path in self.files.lows}
        return {path: site for path, site in found.items() if site is not None}

    @cached_property
    def base_modules(self) -> dict[str, nn.Module]:
        """The base's modules by path; none without a base."""
        return dict(base_modules(self.base.model)) if self.base is not None else {}

    @cached_property
    def fitting(self) -> dict[str, LowRank]:
        """The updates that have a place of their shape in the base."""
        placed = {path: self._placed(path, site) for path, site in self.sites.items()}
        return {path: low for path, low in placed.items() if low is not None}

    def _placed(self, path: str, site: Site) -> LowRank | None:
        low = self.files.lows[path]
        (features, out), blocks = site.shape, site.blocks
        if self.files.stored is None:  # a salvaged update says neither blocks nor kernel
            low = low._replace(kind=site.kind, kernel=site.kernel)
        elif low.kind in ("linear", "transposed") and site.kind in ("linear", "transposed"):
            low = low._replace(kind=site.kind)
        own = (low.kind, low.kernel, low.blocks, low.A.shape[1], low.B.shape[0] // low.blocks)
        return low if own == (site.kind, site.kernel, blocks, features, out) else None

    def weight(self, path: str) -> Tensor:
        """The base's weight that a fitting update changes, as the base stores it."""
        site = self.sites[path]
        return self.base_modules[site.owner].get_parameter(site.name).detach()

    @cached_property
    def modules(self) -> list[Module]:
        """Every update in numbers."""
        return [self._measured(path, self.fitting.get(path, low)) for path, low in self.files.lows.items()]

    def _measured(self, path: str, low: LowRank) -> Module:
        largest = float(torch.stack([low.A.abs().max(), low.B.abs().max()]).max())  # NaN where one is
        finite = math.isfinite(largest) and finite_scale(low.scale)
        found = spectrum(low) if finite else None
        norm = found.norm if found is not None and low.magnitude is None else None
        ratio = None
        if found is not None and path in self.fitting:
            weight = self.weight(path)
            if low.magnitude is not None:
                norm = float(change(weight, low).norm())
            size = float(weight.norm(dtype=torch.float32))
            ratio = norm / size if norm is not None and size else None
        return Module(path, low.kind, low.rank, low.scale, largest, found, norm, ratio)


def some(items: Iterable[object], count: int = 4) -> str:
    """The first few of many, for a sentence."""
    every = [str(item) for item in items]
    more = f" and {len(every) - count} more" if len(every) > count else ""
    return ", ".join(every[:count]) + more
