"""PEFT's tensor names and layouts in our terms, both ways: each update, modules trained in full, copies of the base."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from onebase.adapters.adapter import Adapter, LowRank
from onebase.adapters.kinds import is_parameter
from onebase.adapters.targets import name_matches, pattern_reader, spec_matches
from onebase.adapters.variants import scaling
from onebase.config import LoraConfig
from onebase.ops.lowrank import finite_scale
from onebase.storage.peft_config import TargetSpec
from onebase.storage.peft_tokens import PREFIX

_SIDES: dict[str, tuple[str, bool]] = {  # end of a PEFT tensor name -> (field, belongs to an embedding)
    ".lora_A.weight": ("A", False),
    ".lora_B.weight": ("B", False),
    ".lora_embedding_A": ("A", True),
    ".lora_embedding_B": ("B", True),
    ".lora_B.bias": ("bias", False),
    ".lora_magnitude_vector": ("magnitude", False),
    ".lora_magnitude_vector.weight": ("magnitude", False),  # never written; some PEFT releases did
}
_WIDENED = (torch.float32, torch.float16, torch.bfloat16, torch.float8_e4m3fn, torch.float8_e5m2)
_BASE_COPY = ".base_layer.weight"  # PEFT stores an adapted embedding's own weight beside its update
_TRAINED_BIAS = ".bias"  # bias="lora_only" or "all": a module's own bias as training left it
# With bias="all" the biases of a module trained in full come again, by their names inside PEFT's wrapper.
_WRAPPED = ("modules_to_save.", "original_module.")

# PEFT wraps the module that owns a parameter, once for each of its parameters: the first one innermost, and each
# wrapper adds this to the path of those inside. nn.MultiheadAttention's wrapper stands for its fused input
# weight; the output projection is a module inside it. Its update is added twice (0.21 merges it into a copy of the
# weight and then once more), in training, use and merging alike: the file holds half of it.
_INSIDE = ".base_layer"
_OUTPUT = ".base_layer.out_proj"
_INPUT_WEIGHT, _OUTPUT_WEIGHT = ".in_proj_weight", ".out_proj.weight"


def to_peft_tensors(adapter: Adapter) -> dict[str, Tensor]:
    """Every tensor of an adapter under the name, and in the layout, that PEFT stores it in."""
    tensors: dict[str, Tensor] = {}
    for path, stored in _stored_paths(adapter).items():
        low = adapter.lowrank[path]
        names = {side: end for end, (side, embedding) in reversed(_SIDES.items()) if not embedding}
        if low.kind == "embedding":
            names |= {side: end for end, (side, embedding) in _SIDES.items() if embedding}
        if stored.endswith(_OUTPUT):
            low = low._replace(B=low.B / 2)
        tensors |= {PREFIX + stored + names[side]: t for side, t in _peft_layout(low).items()}
    for path, state in adapter.full.items():
        tensors |= {f"{PREFIX}{path}.{name}": tensor for name, tensor in state.items()}
    return tensors


def _stored_paths(adapter: Adapter) -> dict[str, str]:
    """The path that each update has in PEFT's file."""
    stored, owned = {path: path for path in adapter.lowrank}, defaultdict[str, list[str]](list)
    for path, low in adapter.lowrank.items():
        if not is_parameter(low.kind):
            continue
        if path.endswith(_OUTPUT_WEIGHT):
            stored[path] = path.removesuffix(_OUTPUT_WEIGHT) + _OUTPUT
        else:
            owned[path.rpartition(".")[0]].append(path)
    listed = adapter.config.target_parameters  # in the order in which their module registers them
    for owner, paths in owned.items():
        paths.sort(key=lambda path: next((n for n, one in enumerate(listed) if name_matches(one, path)), 0))
        for depth, path in enumerate(reversed(paths)):
            stored[path] = owner + _INSIDE * depth
    return stored


def _peft_layout(low: LowRank) -> dict[str, Tensor]:
    """Convolutions with their kernel; an expert's B as (out, rank x experts), the expert counting fastest."""
    tensors = low.tensors()
    ones = (1,) * len(low.kernel)
    if low.kernel:
        tensors["A"] = low.A.reshape(low.rank, -1, *low.kernel)
        tensors["B"] = low.B.reshape(*low.B.shape, *ones)
        tensors |= {"magnitude": low.magnitude.reshape(1, -1, *ones)} if low.magnitude is not None else {}
    if low.blocks > 1:
        tensors["B"] = low.B.unflatten(0, (low.blocks, -1)).permute(1, 2, 0).flatten(1)
    return tensors


class Parts(NamedTuple):
    """A file's tensors, sorted: sides of each update, modules trained in full, copies of base tensors, odd names."""

    lows: dict[str, dict[str, Tensor]]
    full: dict[str, dict[str, Tensor]]
    copies: dict[str, Tensor]
    odd: list[str]


def widens(tensor: Tensor) -> bool:
    """Whether float32 holds every value of the tensor's dtype."""
    return tensor.dtype in _WIDENED


def sort_tensors(tensors: Mapping[str, Tensor], saved: tuple[str, ...], biases: bool = False) -> Parts:
    """PEFT's flat names by what they belong to; `saved` names the modules that were trained in full.

    With `biases` the file holds the modules' own, which count as copies of base tensors (`with_biases`).
    """
    lows: dict[str, dict[str, Tensor]] = defaultdict(dict)
    full: dict[str, dict[str, Tensor]] = defaultdict(dict)
    copies: dict[str, Tensor] = {}
    odd: list[str] = []
    for key, tensor in tensors.items():
        name, wide = key.removeprefix(PREFIX), tensor.to(torch.float32)
        end = next((end for end in _SIDES if name.endswith(end)), None)
        path = _saved_path(name, saved)
        if not key.startswith(PREFIX):
            odd.append(f"{key}: unexpected name")
        elif end is not None:
            side, embedding = _SIDES[end]
            lows[name.removesuffix(end)][side] = wide
            if embedding:
                lows[name.removesuffix(end)]["embedding"] = wide
        elif path:
            inner = name.removeprefix(path + ".")
            if not (biases and inner.startswith(_WRAPPED)):
                full[path][inner] = wide
        elif name.endswith(_BASE_COPY):
            copies[name.removesuffix(_BASE_COPY) + ".weight"] = tensor
        elif biases and name.endswith(_TRAINED_BIAS):
            copies[name.removesuffix(_TRAINED_BIAS).removesuffix(_INSIDE) + _TRAINED_BIAS] = tensor
        elif name.endswith(("embed_tokens.weight", "lm_head.weight", "wte.weight", "word_embeddings.weight")):
            copies[name] = tensor  # PEFT adds these whenever it suspects a resized vocabulary
        else:
            odd.append(f"{key}: unexpected name")
    return Parts(dict(lows), dict(full), copies, odd)


def _saved_path(name: str, saved: tuple[str, ...]) -> str:
    """The path of the fully trained module that a tensor belongs to, empty if none.

    By PEFT's rule for these, any end of a path will do: its `classifier` also means DistilBERT's `pre_classifier`.
    """
    if not saved:
        return ""
    parts = name.split(".")
    paths = (".".join(parts[:end]) for end in range(1, len(parts)))
    return next((path for path in paths if path.endswith(saved)), "")


class Place(NamedTuple):
    """Where a stored update belongs: its path (empty if that cannot be told), what rank_pattern may call it, and
    whether it is a parameter's.
    """

    path: str
    spellings: tuple[str, ...]
    parameter: bool = False


def comes_last(name: str) -> bool:
    """Whether this is the one of an expert's two parameters that transformers registers last."""
    return name.endswith("down_proj")


def places(
    stored: Sequence[str], spec: TargetSpec, modules: Mapping[str, nn.Module] | None, ordered: bool
) -> dict[str, Place]:
    """Where each of a file's updates belongs, by the path that it is stored under.

    PEFT's file does not name the parameters: their order in the module that owns them does. Without the base's
    modules the config has to tell it, where it is `ordered`.
    """
    found: dict[str, Place] = {}
    owners: dict[str, list[str]] = defaultdict(list)
    for path in stored:
        if path.endswith(_OUTPUT):
            owner = path.removesuffix(_OUTPUT)
            found[path] = Place(owner + _OUTPUT_WEIGHT, (owner + _OUTPUT_WEIGHT, owner), True)
        else:
            owners[path[: path.index(_INSIDE)] if path.endswith(_INSIDE) else path].append(path)
    for owner, levels in owners.items():
        names = _parameter_names(owner, spec, modules)
        known = (
            ordered or modules is not None or len(names) == 1 or [*map(comes_last, names)] == [False, True]
        )
        if known and len(names) == len(
            levels
        ):  # the last one registered is the outermost, whose path is the shortest
            full = [f"{owner}.{name}" for name in reversed(names)]
            found |= {s: Place(p, (p,), True) for s, p in zip(sorted(levels, key=len), full, strict=True)}
        elif names or len(levels) > 1:
            found |= {stored: Place("", (stored,)) for stored in levels}
        elif _is_attention(owner, found, modules):
            found[owner] = Place(owner + _INPUT_WEIGHT, (owner + _INPUT_WEIGHT, owner), True)
    return {path: found.get(path, Place(path, (path,))) for path in stored}


def target_names(at: Mapping[str, Place]) -> list[str]:
    """The modules of a file's updates, by the names that a config has for them."""
    return [place.spellings[-1] for place in at.values() if not place.parameter or len(place.spellings) > 1]


def _is_attention(owner: str, found: Mapping[str, Place], modules: Mapping[str, nn.Module] | None) -> bool:
    if modules is None:
        return owner + _OUTPUT in found
    return isinstance(modules.get(owner), nn.MultiheadAttention)


def without_idle(
    lows: Mapping[str, Mapping[str, Tensor]], modules: Mapping[str, nn.Module]
) -> dict[str, Mapping[str, Tensor]]:
    """The stored updates but for those of a module that is never called and whose B is still 0.

    PEFT's all-linear wraps the output projection of nn.MultiheadAttention as a layer, where it does nothing.
    """
    return {
        path: sides
        for path, sides in lows.items()
        if not isinstance(modules.get(path.rpartition(".")[0]), nn.MultiheadAttention)
        or bool(sides.get("B", torch.ones(1)).any())
    }


def _parameter_names(owner: str, spec: TargetSpec, modules: Mapping[str, nn.Module] | None) -> list[str]:
    """The owner's targeted parameters in the order of their registration; none where it is targeted itself."""
    if modules is not None:
        own = modules[owner].named_parameters(recurse=False) if spec.parameters and owner in modules else ()
        return [n for n, _ in own if any(name_matches(t, f"{owner}.{n}") for t in spec.parameters)]
    if spec.targets and spec_matches(spec.targets, owner):
        return []
    split = [name.rpartition(".")[::2] for name in spec.parameters]
    named = [last for above, last in split if above and name_matches(above, owner)]
    return named or [last for above, last in split if not above]


def lowrank_updates(
    lows: Mapping[str, Mapping[str, Tensor]],
    at: Mapping[str, Place],
    config: LoraConfig,
    raw: Mapping[str, Any],
) -> tuple[dict[str, LowRank], list[str]]:
    """The updates that the sorted sides make, and a sentence for each that does not fit together."""
    problems: list[str] = []
    lowrank: dict[str, LowRank] = {}
    matrix = "transposed" if raw.get("fan_in_fan_out") else "linear"
    rank_of, alpha_of = pattern_reader(config.ranks), pattern_reader(config.alphas)
    for stored, sides in lows.items():
        place = at[stored]
        rank = rank_of(place.spellings, config.rank)
        alpha = alpha_of(place.spellings, config.alpha)
        a, b = sides.get("A"), sides.get("B")
        if not place.path:
            problems.append(f"{stored}: the config does not tell which parameter this belongs to")
            continue
        if a is None or b is None:
            problems.append(f"{place.path}: lora_{'A' if a is None else 'B'} is missing")
            continue
        if config.dora != ("magnitude" in sides) or ("bias" in sides and not config.lora_bias):
            extra = [side for side in ("magnitude", "bias") if side in sides] or ["no magnitude"]
            problems.append(f"{place.path}: has {' and '.join(extra)}, which the config does not say")
            continue
        kernel = tuple(a.shape[2:])
        blocks = a.shape[0] // rank if place.parameter else 1
        plain = "embedding" if "embedding" in sides else "parameter" if place.parameter else matrix
        scale, kind = scaling(rank, alpha, config.rslora), "conv" if kernel else plain
        low = LowRank(a, b, scale, kind, max(blocks, 1), kernel)
        if not finite_scale(low.scale):
            problems.append(f"{place.path}: its scale of {low.scale:g} is infinite in float32")
            continue
        if problem := _shape_problem(low, sides, rank):
            problems.append(f"{place.path}: A {tuple(a.shape)}, B {tuple(b.shape)}{problem}")
            continue
        if stored.endswith(_OUTPUT):
            low = low._replace(B=low.B * 2)
        lowrank[place.path] = _our_layout(low, sides)
    if config.lora_bias and lowrank and all(low.bias is None for low in lowrank.values()):
        problems.append("the config says lora_bias, and no update has one")
    return lowrank, problems


def _shape_problem(low: LowRank, sides: Mapping[str, Tensor], rank: int) -> str:
    """What does not fit together in a stored update, empty if all does."""
    a, b, dimensions = low.A, low.B, 2 + len(low.kernel)
    if a.ndim < 2 or b.ndim != dimensions or dimensions > 5 or any(n != 1 for n in b.shape[2:]):
        return f", but the config says rank {rank}"
    if low.kernel and a.shape[0] == rank and b.shape[1] and rank % b.shape[1] == 0 and b.shape[1] != rank:
        groups = rank // b.shape[1]
        return f": a convolution of {groups} groups, which has no single W that B·A could be added to"
    if not a.shape[0] == b.shape[1] == rank * low.blocks:
        return f", but the config says rank {rank}"
    for side in ("bias", "magnitude"):
        vector = sides.get(side)
        if vector is not None and vector.numel() != b.shape[0]:
            return f", but its {side} has {vector.numel()} values"
    return ""


def _our_layout(low: LowRank, sides: Mapping[str, Tensor]) -> LowRank:
    """The inverse of `_peft_layout`."""
    b = low.B.flatten(1)
    if low.blocks > 1:
        b = b.unflatten(1, (-1, low.blocks)).permute(2, 0, 1).flatten(0, 1)
    vectors = {side: sides[side].flatten() for side in ("bias", "magnitude") if side in sides}
    return low._replace(A=low.A.flatten(1), B=b, **vectors)
