"""Which modules a config means: matching by PEFT's rules, and a coverage report that shows what was matched."""

from __future__ import annotations

import re
from collections import defaultdict
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import NamedTuple, TypeVar

from torch import nn

from onebase.adapters.kinds import Site, Target, find_site, is_parameter, why_not
from onebase.adapters.layers import bare, base_modules
from onebase.adapters.patterns import first_key, keys_of, matches, named
from onebase.adapters.variants import start_scale
from onebase.config import ALL_LINEAR, REGEX_PREFIX, LoraConfig, parse_layers
from onebase.errors import TargetError, nearest

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


def first_layer(targets: Sequence[Target]) -> int:
    """The lowest layer that is adapted; 0 also where something outside the layers is."""
    return min((split_path(target.path)[1] or 0 for target in targets), default=0)


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
        return matches(spec.removeprefix(REGEX_PREFIX), path)
    return named(spec, path)


def pattern_value(pattern: Mapping[str, V], spellings: Sequence[str], default: V) -> V:
    """PEFT's rule for rank_pattern and alpha_pattern: the first key that matches the end of one of the paths."""
    return pattern_reader(pattern)(spellings, default)


def pattern_reader(pattern: Mapping[str, V]) -> Callable[[Sequence[str], V], V]:
    """`pattern_value` for many paths: (spellings, default) -> value."""
    keys, values = keys_of(tuple(pattern)), tuple(pattern.values())

    def read(spellings: Sequence[str], default: V) -> V:
        places = [place for path in spellings if values and (place := first_key(keys, path)) is not None]
        return values[min(places)] if places else default

    return read


def adaptable(model: nn.Module) -> dict[str, Site]:
    """Every module that can carry an update, by path; one that stands in two places counts under the first.

    nn.MultiheadAttention reads its projections' weights without calling a layer, so these are parameters. The
    model itself stands nowhere, so nothing can stand in its place.
    """
    modules = dict(base_modules(model))
    paths: list[str] = []
    for path, module in _once(modules):
        inside = module.named_parameters() if isinstance(module, nn.MultiheadAttention) else None
        weights = (n for n, p in inside or () if n.endswith("weight") and p.ndim == 2)
        paths += [path] if inside is None else [f"{path}.{n}" for n in weights]
    found = {path: find_site(modules, path) for path in paths}
    return {path: site for path, site in found.items() if site is not None}


def parameter_sites(modules: Mapping[str, nn.Module], names: Sequence[str]) -> dict[str, Site | None]:
    """The parameters of these names (the full name, or its end after a dot), None where one carries no update."""
    if not names:
        return {}
    found = (f"{path}.{n}" for path, m in _once(modules) for n, _ in m.named_parameters(recurse=False))
    found = (*(name for name, _ in modules[""].named_parameters(recurse=False)), *found)
    return {full: find_site(modules, full) for full in found if any(name_matches(n, full) for n in names)}


def _once(modules: Mapping[str, nn.Module]) -> list[tuple[str, nn.Module]]:
    """Each module below the model, under its first path."""
    first = {module: path for path, module in reversed(list(modules.items()))}
    return [(path, module) for path, module in modules.items() if path and first[module] == path]


def labels(path: str, site: Site) -> tuple[str, ...]:
    """The paths by which a config's module names may mean a site: its own, and for attention inputs their module's."""
    inner = path.rpartition(".")[0]
    return tuple(dict.fromkeys((path, inner, site.owner))) if is_parameter(site.kind) else (path,)


def output_head(model: nn.Module) -> nn.Module | None:
    """The layer that makes the logits, where the model names it (transformers' get_output_embeddings)."""
    getter = getattr(model, "get_output_embeddings", None)
    head = getter() if callable(getter) else None
    return bare(head) if isinstance(head, nn.Module) else None


def match(model: nn.Module, config: LoraConfig) -> Coverage:
    """The modules and parameters that a config means on a model. Raises TargetError with every problem found.

    `all-linear` is every linear layer but the output head, as in PEFT, and the experts and their router where
    these were linear layers once (`_expert_weights`). Listed names match the end of a path; a name, exclusion,
    layer or pattern that matches nothing is an error.
    """
    candidates, modules = adaptable(model), dict(base_modules(model))
    full = _full_modules(model, config.modules_to_save)
    paths = _matched(model, candidates, config)
    paths = _without(paths, candidates, config.exclude_modules)
    named = _named_parameters(modules, paths, config)
    spellings = {path: labels(path, candidates[path]) for path in paths} | {name: (name,) for name in named}
    kept = [p for p in spellings if not any(p == f or p.startswith(f + ".") for f in full)]
    stacks = _stacks([*candidates, *named])
    kept = _in_layers(kept, stacks, config.layers)
    if not kept and (config.target_modules or config.target_parameters):
        asked = _show(config.target_modules or config.target_parameters)
        raise TargetError(f"target_modules {asked}", "nothing is left to adapt")
    targets = tuple(_target(p, (candidates | named)[p], spellings[p], config) for p in kept)
    _check_room(targets, config)
    check_dropout(targets, config)
    _check_patterns(config, [spellings[path] for path in kept])
    uneven = () if config.target_modules == ALL_LINEAR else _uneven(kept, stacks, config.layers)
    return Coverage(targets, full, uneven)


def _expert_weights(modules: Mapping[str, nn.Module]) -> list[str]:
    """The experts' and routers' parameters that `all-linear` means, by their full names.

    Until transformers 5 these were linear layers. PEFT goes on to count them in for the Mixtral and Qwen-MoE
    families, whose experts are stored (experts, out, in); not for GPT-OSS, whose never were linear layers.
    """
    found: list[str] = []
    for path, module in modules.items():
        block, _, last = path.rpartition(".")
        weights = [getattr(module, name, None) for name in ("gate_up_proj", "down_proj")]
        if last == "experts" and getattr(module, "is_transposed", None) is False and None not in weights:
            found += [f"{path}.gate_up_proj", f"{path}.down_proj"]
            router = modules.get(f"{block}.gate")
            found += [f"{block}.gate.weight"] if router and not isinstance(router, nn.Linear) else []
    return found


def _named_parameters(
    modules: Mapping[str, nn.Module], paths: Sequence[str], config: LoraConfig
) -> dict[str, Site]:
    """What `target_parameters` means, and `all-linear`; `paths` are the modules that are targeted already."""
    experts = _expert_weights(modules) if config.target_modules == ALL_LINEAR else []
    found, named = parameter_sites(modules, [*config.target_parameters, *experts]), dict[str, Site]()
    for name in config.target_parameters:
        if not any(name_matches(name, full) for full in found):
            every = (f"{p}.{n}" for p, m in modules.items() for n, _ in m.named_parameters(recurse=False))
            raise TargetError(
                f"target_parameters {name}",
                f"no parameter is named {name}",
                _nearest_in(name.rpartition(".")[2], every),
            )
    for full, site in found.items():
        if site is None:
            said = "an update needs a matrix, or a stack of them (3 dimensions)"
            if "." not in full:
                said = "a parameter of the model itself has no module around it that an update could stand beside"
            raise TargetError(f"target_parameters {full}", said)
        if full in paths or site.owner in paths:
            said = f"its module {site.owner} is targeted too, and an update can go into one of them only"
            raise TargetError(f"target_parameters {full}", said, hint="leave the module out: exclude_modules")
        named[full] = site
    return named


def check_dropout(targets: Sequence[Target], config: LoraConfig) -> None:
    """Raise TargetError where dropout is asked for and some target has no input to drop."""
    changed = [target.path for target in targets if is_parameter(target.site.kind)]
    if config.dropout and changed:
        found = f"{changed[0]} is a parameter, whose update has no input of its own that could be dropped"
        raise TargetError(f"dropout {config.dropout}", found, hint="use dropout 0, or leave parameters out")


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
        found = [p for p, site in candidates.items() if site_matches(spec, p, site)]
        if not found:
            raise TargetError(
                f"target_modules {spec}", "the pattern matches no module", _nearest_in(spec, candidates)
            )
        return found
    unmatched = [n for n in spec if not any(site_matches([n], p, site) for p, site in candidates.items())]
    if unmatched:
        raise TargetError(
            f"target_modules {','.join(unmatched)}",
            "; ".join(_why_unmatched(model, name) for name in unmatched),
            dict.fromkeys(near for name in unmatched for near in _nearest_in(name, candidates)),
        )
    return [p for p, site in candidates.items() if site_matches(spec, p, site)]


def site_matches(spec: str | Sequence[str], path: str, site: Site) -> bool:
    """Whether a target or exclusion spec means this site."""
    return any(spec_matches(spec, label) for label in labels(path, site))


def _nearest_in(name: str, paths: Iterable[str]) -> list[str]:
    return nearest(name.removeprefix(REGEX_PREFIX), dict.fromkeys(path.rsplit(".", 1)[-1] for path in paths))


def _why_unmatched(model: nn.Module, name: str) -> str:
    module = next((m for path, m in base_modules(model) if name_matches(name, path)), None)
    if module is None:
        return f"no module is named {name}"
    return f"{name} is {why_not(module)}"


def _without(paths: list[str], sites: Mapping[str, Site], spec: str | Sequence[str]) -> list[str]:
    specs = [spec] if isinstance(spec, str) else [[name] for name in spec]
    for one in specs:
        if not any(site_matches(one, path, sites[path]) for path in paths):
            raise TargetError(
                f"exclude_modules {_show(one)}", "excludes nothing", _nearest_in(_show(one), paths)
            )
    return [p for p in paths if not any(site_matches(one, p, sites[p]) for one in specs)]


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


def _check_room(targets: Sequence[Target], config: LoraConfig) -> None:
    """`all-linear` may mean a layer that is smaller than the rank, not none that is large enough."""
    widest = max(targets, key=lambda target: min(target.site.shape), default=None)
    if widest and config.target_modules == ALL_LINEAR and widest.rank > min(widest.site.shape):
        raise _too_much(widest.path, widest.site, widest.rank)


def _too_much(path: str, site: Site, rank: int) -> TargetError:
    features, out = site.shape
    found = f"the weight is {out} x {features}, so a rank above {min(site.shape)} adds nothing"
    return TargetError(f"rank {rank} for {path}", found)


def _target(path: str, site: Site, spellings: Sequence[str], config: LoraConfig) -> Target:
    rank = pattern_value(config.ranks, spellings, config.rank)
    # `all-linear` also means layers that are smaller than the rank, such as a router or a classifier.
    if rank > min(site.shape) and not (config.target_modules == ALL_LINEAR and rank == config.rank):
        raise _too_much(path, site, rank)
    alpha = pattern_value(config.alphas, spellings, config.alpha)
    return Target(path, site, rank, start_scale(rank, alpha, config))


def _check_patterns(config: LoraConfig, spellings: Sequence[Sequence[str]]) -> None:
    for option, keys in (("rank_pattern", config.ranks), ("alpha_pattern", config.alphas)):
        for key in keys:
            if not any(pattern_value({key: True}, names, False) for names in spellings):
                near = _nearest_in(key, (names[-1] for names in spellings))
                raise TargetError(f"{option} {key}", "matches no targeted module", near)


class Names(NamedTuple):
    """How a config names targets so that every reader means the same by it."""

    modules: tuple[str, ...]
    parameters: tuple[str, ...]


def names_for(model: nn.Module, targets: Sequence[Target]) -> Names:
    """Short names where they mean exactly these targets, else full ones.

    PEFT knows an nn.MultiheadAttention by its own name only, and means all of it.
    """
    modules = dict(base_modules(model))
    every = [f"{path}.{n}" for path, m in modules.items() for n, _ in m.named_parameters(recurse=False)]
    wholes: set[str] = set()
    single: list[str] = []
    parts: dict[str, list[str]] = defaultdict(list)
    for path, site, *_ in targets:
        if not is_parameter(site.kind):
            wholes.add(path)
        elif isinstance(modules[site.owner], nn.MultiheadAttention):
            parts[site.owner].append(site.name)
        else:
            single.append(path)
    inside: list[str] = []  # the output projection alone, for which PEFT has no name
    for owner, names in parts.items():
        if set(names) == {"in_proj_weight", "out_proj.weight"}:
            wholes.add(owner)
        else:
            single += [f"{owner}.{name}" for name in names if name != "out_proj.weight"]
            inside += [f"{owner}.out_proj.weight"] if "out_proj.weight" in names else []
    return Names((*sorted(_short(wholes, modules, 1)), *inside), tuple(_short(single, every, 2)))


def _short(wanted: Iterable[str], every: Iterable[str], parts: int) -> list[str]:
    """The last parts of the wanted names where they mean no other."""
    wanted = list(wanted)
    short = list(dict.fromkeys(".".join(path.split(".")[-parts:]) for path in wanted))
    meant = {path for path in every if any(name_matches(name, path) for name in short)}
    return short if meant == set(wanted) else wanted
