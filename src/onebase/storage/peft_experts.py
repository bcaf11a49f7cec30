"""PEFT adapters of experts that were linear layers, one by one, until transformers 5 stacked them into parameters.

The files hold `...experts.3.w1.lora_A.weight`; today's models have `...experts.gate_up_proj` (experts, out, in). What
comes out is the same update in the layout that PEFT has for such parameters.
"""

from __future__ import annotations

import re
from collections import defaultdict
from collections.abc import Mapping
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from onebase.adapters.kinds import kind_of
from onebase.adapters.targets import name_matches, pattern_value
from onebase.adapters.variants import scaling

_EXPERT = re.compile(r"(?P<block>.*)\.experts\.(?P<number>\d+)\.(?P<name>\w+)")
# The layer's name -> the parameter that holds it now, and which of its halves, if it has some.
_PARTS = {
    **dict.fromkeys(("w1", "gate_proj"), ("gate_up_proj", 0)),
    **dict.fromkeys(("w3", "up_proj"), ("gate_up_proj", 1)),
    **dict.fromkeys(("w2", "down_proj"), ("down_proj", 0)),
}
_PARAMETERS = ("gate_up_proj", "down_proj")  # in the order in which they are registered
_RENAMED = (".block_sparse_moe", ".mlp")  # Mixtral's block, before and now

Sides = Mapping[str, Tensor]


class Restored(NamedTuple):
    """A file's updates and PEFT's config as they would be for today's model, and what could not be converted."""

    lows: dict[str, Sides]
    raw: dict[str, Any]
    problems: list[str]


def stacked_experts(
    lows: Mapping[str, Sides], raw: Mapping[str, Any], modules: Mapping[str, nn.Module]
) -> Restored:
    """The updates of single experts as updates of their stacks; all else, and a model that has no stacks, as it is.

    The halves of gate_up_proj have factors of their own: A = [A_gate; A_up], B = diag(B_gate, B_up), exact and of
    twice the rank. Every expert must be there, with the same rank.
    """
    rest: dict[str, Sides] = {}
    found: dict[str, dict[str, dict[int, Sides]]] = defaultdict(lambda: defaultdict(dict))
    routers: list[str] = []
    for path, sides in lows.items():
        expert, router = _EXPERT.fullmatch(path), path.replace(*_RENAMED)
        block = _block(expert["block"], modules) if expert else ""
        if expert and block and expert["name"] in _PARTS:
            layer = f"{expert['block']}.experts.*.{expert['name']}"
            found[f"{block}.experts"][layer][int(expert["number"])] = sides
        elif path.endswith(".gate") and _is_router(modules.get(router)):
            rest[router] = sides
            routers.append(router)
        else:
            rest[path] = sides
    if not found:
        return Restored(dict(lows), dict(raw), [])
    changed, problems = _targets(raw, rest, routers, modules), list[str]()
    for owner, layers in found.items():
        made = _stacks(owner, layers, changed, _sizes(modules[owner]))
        problems += made.problems
        rest |= made.lows
        changed = made.raw
    return Restored(rest, changed, problems)


def _block(block: str, modules: Mapping[str, nn.Module]) -> str:
    """Today's path of a block whose experts are a stack; empty where the model has none there."""
    for path in (block, block.replace(*_RENAMED)):
        if getattr(modules.get(f"{path}.experts"), "is_transposed", None) is False and _sizes(
            modules[f"{path}.experts"]
        ):
            return path
    return ""


def _sizes(experts: nn.Module) -> dict[str, tuple[int, ...]]:
    """The shapes (experts, out, in) of the parameters that hold what were layers."""
    return {
        name: tuple(p.shape) for name, p in experts.named_parameters(recurse=False) if name in _PARAMETERS
    }


def _is_router(module: nn.Module | None) -> bool:
    weight = getattr(module, "weight", None)
    return module is not None and kind_of(module) is None and isinstance(weight, Tensor) and weight.ndim == 2


def _targets(
    raw: Mapping[str, Any], rest: Mapping[str, Sides], routers: list[str], modules: Mapping[str, nn.Module]
) -> dict[str, Any]:
    """The config with the target names that still mean layers, and with the routers' weights as parameters."""
    listed: Any = raw.get("target_modules")
    if isinstance(listed, list):
        layers = [path for path, module in modules.items() if kind_of(module)]
        names = [name for name in listed if any(name_matches(name, path) for path in layers)]
    else:  # a pattern was for the old paths
        names = [path for path in rest if path not in routers]
    parameters = [*(raw.get("target_parameters") or []), *(f"{path}.weight" for path in routers)]
    patterns = {name: dict(raw.get(name) or {}) for name in ("rank_pattern", "alpha_pattern")}
    return {**raw, "target_modules": names, "target_parameters": parameters, **patterns}


def _stacks(
    owner: str,
    layers: Mapping[str, Mapping[int, Sides]],
    raw: Mapping[str, Any],
    sizes: Mapping[str, tuple[int, ...]],
) -> Restored:
    """The parameters of one module; the last one registered has the module's own path in the file."""
    parts: dict[str, dict[int, tuple[str, Mapping[int, Sides]]]] = defaultdict(dict)
    problems: list[str] = []
    for layer, experts in layers.items():
        parameter, half = _PARTS[layer.rpartition(".")[2]]
        problems += _misfits(layer, experts, sizes[parameter], halves=2 if parameter == _PARAMETERS[0] else 1)
        parts[parameter][half] = layer, experts
    raw = {name: dict(value) if isinstance(value, dict) else value for name, value in raw.items()}
    made: dict[str, Sides] = {}
    if problems:
        return Restored(made, raw, problems)
    present = [name for name in _PARAMETERS if name in parts]
    for depth, name in enumerate(reversed(present)):
        sides, rank, alpha = _fused(parts[name], raw, sizes[name])
        made[owner + ".base_layer" * depth] = sides
        key = f"^{re.escape(f'{owner}.{name}')}"
        # The first key that matches counts, and the old patterns may match the new path.
        raw["rank_pattern"] = {key: rank, **raw["rank_pattern"]}
        raw["alpha_pattern"] = {key: alpha, **raw["alpha_pattern"]}
    raw["target_parameters"] = [*raw["target_parameters"], *(f"{owner}.{name}" for name in present)]
    return Restored(made, raw, [])


def _misfits(layer: str, experts: Mapping[int, Sides], size: tuple[int, ...], halves: int) -> list[str]:
    count, out, features = size
    if missing := [n for n in range(count) if n not in experts] or [n for n in experts if n >= count]:
        return [f"{layer}: {len(experts)} experts of the base's {count}, not the same ({missing[:5]})"]
    if extra := sorted({side for sides in experts.values() for side in sides} - {"A", "B"}):
        return [f"{layer}: {', '.join(extra)} of a single expert has no place in a stack of them"]
    if any(side not in sides for sides in experts.values() for side in ("A", "B")):
        return [f"{layer}: lora_A or lora_B of an expert is missing"]
    shapes = {(*sides["A"].shape, *sides["B"].shape) for sides in experts.values()}
    rank = next(iter(shapes))[0]
    if shapes != {(rank, features, out // halves, rank)}:
        return [
            f"{layer}: A and B of {sorted(shapes)}, and an expert of the base is {out // halves} x {features}"
        ]
    return []


def _fused(
    halves: Mapping[int, tuple[str, Mapping[int, Sides]]], raw: Mapping[str, Any], size: tuple[int, ...]
) -> tuple[Sides, int, float]:
    """A and B of one parameter as PEFT stores them, their rank, and the alpha that gives the first half's scale."""
    a_parts: list[Tensor] = []
    b_parts: list[Tensor] = []
    scales: list[float] = []
    count, out, _ = size
    rslora = bool(raw.get("use_rslora"))
    for half, (layer, experts) in sorted(halves.items()):
        a_eri, b_eor = (torch.stack([experts[n][side] for n in range(count)]) for side in ("A", "B"))
        alpha = pattern_value(raw["alpha_pattern"], [layer.replace("*", "0")], raw["lora_alpha"])
        scales.append(scaling(a_eri.shape[1], alpha, rslora))
        wide = torch.zeros(count, out, b_eor.shape[2])
        rows = b_eor.shape[1]
        wide[:, half * rows : (half + 1) * rows] = b_eor * (scales[-1] / scales[0])
        a_parts.append(a_eri)
        b_parts.append(wide)
    a, b = torch.cat(a_parts, dim=1), torch.cat(b_parts, dim=2)
    rank = a.shape[1]
    alpha = scales[0] / scaling(rank, 1.0, rslora)
    return {"A": a.flatten(0, 1), "B": b.permute(1, 2, 0).flatten(1)}, rank, alpha
