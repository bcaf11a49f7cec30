"""Which stored tensors each parameter of a model is loaded from, by transformers' own rules, and the way back.

Most parameters are stored as they stand, some under an older name. Others are made of several stored tensors, such as
a stack of experts that the files hold one by one: transformers' converters make them, and their inverses take them
apart again.
"""

from __future__ import annotations

import copy
import json
from collections import defaultdict
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import torch
import transformers
from torch import Tensor
from transformers.conversion_mapping import USER_REGISTERED_MAPPINGS, get_model_conversion_mapping
from transformers.core_model_loading import (
    WeightConverter,
    WeightRenaming,
    dot_natural_key,
    rename_source_key,
)

from onebase.models.fingerprint import remembered
from onebase.storage.shards import TensorInfo
from onebase.transforms.merge import Fusion


class Sources(NamedTuple):
    """Where a model's parameters are stored; those that no file holds are in neither."""

    plain: Mapping[str, str]  # parameter -> the stored tensor that it is loaded from as it stands
    fusions: tuple[Fusion, ...]


def sources_of(model: Any, tensors: Sequence[TensorInfo], config: Path) -> Sources:
    """Sort the stored tensors by what transformers makes of them for this model (it may be on the meta device).

    Where each parameter is one stored tensor, that is remembered for these files and the model's configuration:
    transformers compiles the rules of all its models to tell one's, which is most of the time that planning takes.
    """
    if USER_REGISTERED_MAPPINGS:  # rules of this process alone
        return _sort(model, tensors)
    made: list[Sources] = []

    def told() -> str:
        made.append(_sort(model, tensors))
        return json.dumps(None if made[0].fusions else made[0].plain)

    kind = f"sources, transformers {transformers.__version__}, {type(model).__name__}"
    plain = json.loads(remembered(kind, [config, *sorted({info.file for info in tensors})], told))
    return Sources(plain, ()) if plain is not None else (made or [_sort(model, tensors)])[0]


def _sort(model: Any, tensors: Sequence[TensorInfo]) -> Sources:
    transforms = get_model_conversion_mapping(model)
    renamings = [one for one in transforms if isinstance(one, WeightRenaming)]
    converters = [one for one in transforms if isinstance(one, WeightConverter)]
    of_pattern = {pattern: one for one in converters for pattern in one.source_patterns}
    state, prefix = model.state_dict(), model.base_model_prefix
    infos = {info.name: info for info in tensors}
    plain: dict[str, str] = {}
    pieces: dict[str, list[tuple[str, TensorInfo]]] = defaultdict(list)
    for name in sorted(infos, key=dot_natural_key):  # the order in which transformers stacks them
        own, pattern = rename_source_key(name, renamings, converters, prefix, state)
        if own not in state and name in state:
            own, pattern = name, None
        if own in state and pattern is None:
            plain[own] = name
        elif own in state and pattern is not None:
            pieces[own].append((pattern, infos[name]))
    made = [_fusion(model, of_pattern[found[0][0]], first, found) for first, found in pieces.items()]
    return Sources(plain, tuple(fusion for fusion in made if fusion is not None))


def _fusion(
    model: Any, converter: WeightConverter, first: str, pieces: Sequence[tuple[str, TensorInfo]]
) -> Fusion | None:
    """What this converter makes of these stored tensors; `first` is its first parameter."""

    def join(stored: Mapping[str, Tensor]) -> dict[str, Tensor]:
        forward: Any = copy.deepcopy(converter)
        for pattern, info in pieces:
            forward.add_tensor(first, info.name, pattern, stored[info.name])
        return _converted(model, forward, first)

    def split(whole: Mapping[str, Tensor]) -> dict[str, Tensor]:
        backward: Any = converter.reverse_transform()
        name = ""
        for parameter, tensor in whole.items():
            name, pattern = backward.rename_source_key(parameter)
            backward.add_tensor(name, parameter, pattern, tensor)
        made = _converted(model, backward, name)
        return {stored: made[key] for key, stored in _split_names(backward, name, converter, pieces).items()}

    try:
        several = len(converter.target_patterns) > 1
        meta = {info.name: torch.empty(info.shape, device="meta") for _, info in pieces} if several else {}
        parameters = tuple(join(meta)) if several else (first,)
    except Exception:  # a converter that fails on these shapes, in its own way
        return None
    return Fusion(tuple(info.name for _, info in pieces), parameters, join, split)


def _converted(model: Any, transform: Any, name: str) -> dict[str, Tensor]:
    made = transform.convert(name, model=model, config=model.config)
    return {key: value[0] if isinstance(value, list) else value for key, value in made.items()}


def _split_names(
    backward: Any, name: str, converter: WeightConverter, pieces: Sequence[tuple[str, TensorInfo]]
) -> dict[str, str]:
    """The name that the inverse gives to each piece -> the stored tensor that it is; a `*` counts the pieces."""
    before, _, after = name.partition(backward.target_patterns[0])
    found: dict[str, str] = {}
    for source, target in zip(converter.source_patterns, backward.target_patterns, strict=True):
        own = [info.name for pattern, info in pieces if pattern == source]
        found |= {before + target.replace("*", str(n)) + after: stored for n, stored in enumerate(own)}
    return found
