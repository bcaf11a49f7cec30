"""Which modules a config means: matching by PEFT's rules, and a coverage report that shows what was matched."""

from __future__ import annotations

import re
from collections import defaultdict
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import NamedTuple, TypeVar

from torch import nn

from onebase.config import ALL_LINEAR, REGEX_PREFIX, LoraConfig, parse_layers
from onebase.errors import TargetError, nearest
from onebase.kinds import KINDS, Site, Target, find_site
from onebase.layers import bare, base_modules
from onebase.variants import scaling

V = TypeVar("V")


class CoverageRow(NamedTuple):
    """The targets that are alike but for their layer."""

    target: str  # the path with `*` for the layer's number
    modules: int
    layers: str  # such as 0-29; empty outside the layers
    shape: tuple[int, int]
    rank: int
    scale: float


@dataclass(frozen=True)
class Coverage:
    """What a config matches on a model."""

    targets: tuple[Target, ...]
    full: tuple[str, ...] = ()  # paths of the modules that are trained in full
    uneven: tuple[str, ...] = ()  # a sentence for each target that matches only some layers of its stack

    def rows(self) -> list[CoverageRow]:
        """The report, one row for each target name."""
        groups: dict[tuple[str, tuple[int, int], int, float], list[int]] = defaultdict(list)
        for t in self.targets:
            stack, layer, rest = split_path(t.path)
            name = t.path if layer is None else f"{stack}.*.{rest}"
            groups[name, t.site.shape, t.rank, t.scale].append(-1 if layer is None else layer)
        return [
            CoverageRow(name, len(layers), _ranges(sorted(n for n in layers if n >= 0)), shape, rank, scale)
            for (name, shape, rank, scale), layers in groups.items()
        ]


def split_path(path: str) -> tuple[str, int | None, str]:
    """`model.layers.3.mlp.up_proj` -> ("model.layers", 3, "mlp.up_proj"); the first number is the layer's."""
    match = re.match(r"(?P<stack>.*?)\.(?P<layer>\d+)\.(?P<rest>.+)$", path)
    return (match["stack"], int(match["layer"]), match["rest"]) if match else ("", None, path)


def _ranges(numbers: Iterable[int]) -> str:
    parts: list[list[int]] = []
    for number in sorted(set(numbers)):
        if parts and number == parts[-1][1] + 1:
            parts[-1][1] = number
        else:
            parts.append([number, number])
    return ",".join(str(a) if a == b else f"{a}-{b}" for a, b in parts)


def name_matches(name: str, path: str) -> bool:
    """PEFT's rule for a listed name: the whole path, or its end after a dot."""
    return path == name or path.endswith("." + name)


def spec_matches(spec: str | Sequence[str], path: str) -> bool:
    """Whether a target or exclusion spec (names, or `re:` and a pattern for the whole path) means this path."""
    if isinstance(spec, str):
        return bool(re.fullmatch(spec.removeprefix(REGEX_PREFIX), path))
    return any(name_matches(name, path) for name in spec)


def pattern_value(pattern: Mapping[str, V], path: str, default: V) -> V:
    """PEFT's rule for rank_pattern and alpha_pattern: the first key that matches the path's end."""
    return next((v for key, v in pattern.items() if re.match(rf"(.*\.)?({key})$", path)), default)


def adaptable(model: nn.Module) -> dict[str, Site]:
    """Every place for an update, by path; a module that stands in two places counts under the first.

    nn.MultiheadAttention reads its projections' weights without calling a layer, so these are parameters.
    """
    modules = dict(base_modules(model))
    inside: tuple[str, ...] = ()
    found: dict[str, Site | None] = {}
    seen: set[nn.Module] = set()
    for path, module in modules.items():
        if module in seen:
            continue
        seen.add(module)
        if isinstance(module, nn.MultiheadAttention):
            inside = (*inside, path + ".")
            names = [
                f"{path}.{n}" for n, p in module.named_parameters() if n.endswith("weight") and p.ndim == 2
            ]
            found |= {name: find_site(modules, name) for name in names}
        elif not path.startswith(inside):
            found[path] = find_site(modules, path)
    return {path: site for path, site in found.items() if site is not None}


def labels(path: str, site: Site) -> tuple[str, ...]:
    """The paths by which a config may name a site: its own, and for a parameter its module's."""
    inner = path.rpartition(".")[0]
    return tuple(dict.fromkeys((path, inner, site.owner))) if site.kind.startswith("parameter") else (path,)


def output_head(model: nn.Module) -> nn.Module | None:
    """The layer that makes the logits, where the model names it (transformers' get_output_embeddings)."""
    getter = getattr(model, "get_output_embeddings", None)
    head = getter() if callable(getter) else None
    return bare(head) if isinstance(head, nn.Module) else None


def match(model: nn.Module, config: LoraConfig) -> Coverage:
    """The modules that a config means on a model. Raises TargetError with every problem found.

    `all-linear` is every linear layer but the output head, as in PEFT. Listed names match the end of a path;
    a name, exclusion, layer or pattern that matches nothing is an error.
    """
    candidates = adaptable(model)
    full = _full_modules(model, config.modules_to_save)
    paths = _matched(model, candidates, config)
    paths = _without(paths, config.exclude_modules)
    paths = [p for p in paths if not any(p == f or p.startswith(f + ".") for f in full)]
    stacks = _stacks(candidates)
    paths = _in_layers(paths, stacks, config.layers)
    if not paths and config.target_modules:
        raise TargetError(f"target_modules {_show(config.target_modules)}", "nothing is left to adapt")
    targets = tuple(_target(path, candidates[path], config) for path in paths)
    _check_patterns(config, paths)
    uneven = () if config.target_modules == ALL_LINEAR else _uneven(paths, stacks, config.layers)
    return Coverage(targets, full, uneven)


def _show(spec: str | Sequence[str]) -> str:
    return spec if isinstance(spec, str) else ",".join(spec)


def _matched(model: nn.Module, candidates: Mapping[str, Site], config: LoraConfig) -> list[str]:
    spec = config.target_modules
    if spec == ALL_LINEAR:
        head = output_head(model)
        modules = dict(base_modules(model))
        return [
            path
            for path, site in candidates.items()
            if site.kind not in ("embedding", "conv") and modules[site.owner] is not head
        ]
    if isinstance(spec, str):
        found = [p for p, site in candidates.items() if _means(spec, p, site)]
        if not found:
            raise TargetError(
                f"target_modules {spec}", "the pattern matches no module", _nearest_in(spec, candidates)
            )
        return found
    unmatched = [n for n in spec if not any(_means([n], p, site) for p, site in candidates.items())]
    if unmatched:
        raise TargetError(
            f"target_modules {','.join(unmatched)}",
            "; ".join(_why_unmatched(model, name) for name in unmatched),
            dict.fromkeys(near for name in unmatched for near in _nearest_in(name, candidates)),
        )
    return [p for p, site in candidates.items() if _means(spec, p, site)]


def _means(spec: str | Sequence[str], path: str, site: Site) -> bool:
    return any(spec_matches(spec, label) for label in labels(path, site))


def _nearest_in(name: str, paths: Iterable[str]) -> list[str]:
    return nearest(name.removeprefix(REGEX_PREFIX), dict.fromkeys(path.rsplit(".", 1)[-1] for path in paths))


def _why_unmatched(model: nn.Module, name: str) -> str:
    module = next((m for path, m in base_modules(model) if name_matches(name, path)), None)
    if module is None:
        return f"no module is named {name}"
    return f"{name} is a {type(module).__name__}, which carries no update (kinds: {', '.join(KINDS)})"


def _without(paths: list[str], spec: str | Sequence[str]) -> list[str]:
    specs = [spec] if isinstance(spec, str) else [[name] for name in spec]
    for one in specs:
        if not any(spec_matches(one, path) for path in paths):
            raise TargetError(
                f"exclude_modules {_show(one)}", "excludes nothing", _nearest_in(_show(one), paths)
            )
    return [p for p in paths if not any(spec_matches(one, p) for one in specs)]


def _full_modules(model: nn.Module, names: Sequence[str]) -> tuple[str, ...]:
    paths = [path for path, _ in base_modules(model) if path]
    for name in names:
        if not any(name_matches(name, path) for path in paths):
            raise TargetError(f"modules_to_save {name}", "no module of that name", _nearest_in(name, paths))
    return tuple(path for path in paths if any(name_matches(name, path) for name in names))


def _stacks(paths: Iterable[str]) -> dict[str, set[int]]:
    """The layer numbers of each stack of layers, such as {"model.layers": {0, ..., 29}}."""
    stacks: dict[str, set[int]] = defaultdict(set)
    for stack, layer, _ in map(split_path, paths):
        if layer is not None:
            stacks[stack].add(layer)
    return stacks


def _in_layers(paths: list[str], stacks: Mapping[str, set[int]], text: str) -> list[str]:
    wanted = parse_layers(text)
    known = set[int]().union(*stacks.values())
    if wanted - known:
        found = f"the model has layers {_ranges(known) or 'without numbers'}"
        raise TargetError(f"layers {text}: {_ranges(wanted - known)}", found)
    return [p for p in paths if split_path(p)[1] in wanted] if wanted else paths


def _uneven(paths: Iterable[str], stacks: Mapping[str, set[int]], text: str) -> tuple[str, ...]:
    got: dict[tuple[str, str], set[int]] = defaultdict(set)
    for stack, layer, rest in map(split_path, paths):
        if layer is not None:
            got[stack, rest].add(layer)
    wanted = parse_layers(text)
    return tuple(
        f"{stack}.*.{rest} matches layers {_ranges(layers)} of {_ranges(stacks[stack])}"
        for (stack, rest), layers in got.items()
        if layers != (stacks[stack] & wanted if wanted else stacks[stack])
    )


def _target(path: str, site: Site, config: LoraConfig) -> Target:
    rank = pattern_value(config.ranks, path, config.rank)
    if rank > min(site.shape):
        features, out = site.shape
        found = f"the weight is {out} x {features}, so a rank above {min(site.shape)} adds nothing"
        raise TargetError(f"rank {rank} for {path}", found)
    alpha = pattern_value(config.alphas, path, config.alpha)
    return Target(path, site, rank, scaling(rank, alpha, config.rslora))


def _check_patterns(config: LoraConfig, paths: Sequence[str]) -> None:
    for option, keys in (("rank_pattern", config.ranks), ("alpha_pattern", config.alphas)):
        for key in keys:
            if not any(pattern_value({key: True}, path, False) for path in paths):
                raise TargetError(f"{option} {key}", "matches no targeted module", _nearest_in(key, paths))
