"""PEFT's bias="lora_only" and "all", which store whole biases of the base: here, what training added to each.

A layer's bias is then the bias of its update (`lora_bias`), of one that is zero where the file has none; a norm, whose
tensors are small, counts as trained in full. PEFT reads both as the same function.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace

import torch
from torch import Tensor, nn

from onebase.adapters.adapter import Adapter, LowRank
from onebase.adapters.kinds import find_site
from onebase.adapters.targets import pattern_reader
from onebase.adapters.variants import scaling

_LAYERS = ("linear", "transposed", "conv")  # the kinds that a lora_bias is for


def with_biases(
    adapter: Adapter, copies: Mapping[str, Tensor], modules: Mapping[str, nn.Module]
) -> tuple[Adapter, list[str]]:
    """The adapter with what training added to the base's own biases, and a sentence for each that has no place.

    A bias that is still the base's, at the coarser of the two dtypes, adds nothing.
    """
    lows, full, problems = dict(adapter.lowrank), dict(adapter.full), list[str]()
    for name, bias in copies.items():
        path, _, last = name.rpartition(".")
        own = getattr(modules.get(path), "bias", None)
        if last != "bias":
            continue
        if not isinstance(own, Tensor) or own.shape != bias.shape:
            has = f"the base has none of {tuple(bias.shape)} there"
            problems.append(f"{name}: a trained bias, and {has}")
            continue
        coarse = min((bias.dtype, own.dtype), key=lambda dtype: torch.finfo(dtype).bits)
        if torch.equal(bias.to(coarse), own.detach().to(coarse).cpu()):
            continue
        low = lows.get(path) or _still(path, adapter, modules)
        state = modules[path].state_dict()
        if low is not None and adapter.config.dora:
            problems.append(f"{name}: a trained bias beside DoRA's norms, which onebase does not compute")
        elif low is not None:
            added = (bias.float() - own.detach().float().cpu()) / low.scale
            lows[path] = low._replace(bias=added if low.bias is None else low.bias + added)
        elif path in adapter.full or any(tensor.ndim > 1 for tensor in state.values()):
            kind = type(modules[path]).__name__
            problems.append(f"{name}: a trained bias of a {kind}, which no update and no norm can hold")
        else:
            full[path] = {n: (bias if n == last else t.detach().cpu()).float() for n, t in state.items()}
    return _of(adapter, lows, full), problems


def _of(adapter: Adapter, lows: Mapping[str, LowRank], full: Mapping[str, Mapping[str, Tensor]]) -> Adapter:
    """The adapter with these updates and modules, and with settings that say so."""
    config = adapter.config
    if any(low.bias is not None for low in lows.values()):
        config = replace(config, lora_bias=True)
    if added := sorted(lows.keys() - adapter.lowrank.keys()):
        config = replace(config, target_modules=tuple(sorted({*config.target_modules, *added})))
    if new := [path for path in full if path not in adapter.full]:
        config = replace(config, modules_to_save=(*config.modules_to_save, *new))
    return replace(adapter, config=config, lowrank=lows, full=full)


def _still(path: str, adapter: Adapter, modules: Mapping[str, nn.Module]) -> LowRank | None:
    """An update of zero for a layer that the adapter has none for; None where no update fits."""
    site, config = find_site(modules, path), adapter.config
    if site is None or site.kind not in _LAYERS or path in adapter.full:
        return None
    rank = pattern_reader(config.ranks)((path,), config.rank)
    scale = scaling(rank, pattern_reader(config.alphas)((path,), config.alpha), config.rslora)
    (features, out), kind = site.shape, site.kind
    return LowRank(torch.zeros(rank, features), torch.zeros(out, rank), scale, kind, kernel=site.kernel)
