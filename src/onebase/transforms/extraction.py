"""The adapter that makes a tuned model of its base: the best low-rank product of each W' - W, file by file.

Two stored models are read tensor by tensor; the memory is a few times the largest of them.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import replace
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from onebase.adapters.adapter import Adapter, LowRank, Origin
from onebase.adapters.kinds import Target, blocks_of
from onebase.adapters.layers import base_modules
from onebase.adapters.targets import Coverage, match, name_matches, names_for
from onebase.adapters.variants import check_start, has_bias
from onebase.config import LoraConfig
from onebase.errors import BaseMismatch, ConfigError, TargetError, nearest
from onebase.storage.shards import read_tensor
from onebase.transforms.combining import best_fit
from onebase.transforms.merge import Fusion, Skeleton, stored_name

# Shape suffixes: i = in features, o = out features, r = rank, g = blocks.

SETTING = "config."  # before a setting's name, where a difference is named
# Settings that change no output: training, generation, where the files came from. Shapes are compared as such.
_IDLE = (
    *("_token_id", "dropout", "dropout_prob", "_pdrop", "_range", "_name_or_path", "dtype", "_version"),
    *("use_cache", "architectures", "vocab_size", "tie_word_embeddings", "_map", "id2label", "label2id"),
)


class Fit(NamedTuple):
    """How well an update of low rank holds a layer's W' - W, in Frobenius norms."""

    norm: float  # |W' - W|
    error: float  # |W' - W - s·B·A| / |W' - W|; 0 where W' = W


class Extraction(NamedTuple):
    """The adapter, how well each of its updates fits, and the differences that were allowed and left out."""

    adapter: Adapter
    fits: Mapping[str, Fit]
    left: tuple[str, ...]


def extract_difference(
    base: Skeleton, tuned: Skeleton, config: LoraConfig, allow: Sequence[str] = ()
) -> Extraction:
    """The adapter of `config`'s rank and targets that is nearest to what tuning made of the base.

    Each update is the best of its rank (Eckart and Young 1936), with both factors carrying half of each singular
    value and the scale 1. Modules in `modules_to_save` are taken whole; with `lora_bias` the targets' biases move
    too. Raises BaseMismatch where the models differ in architecture or shapes, or in a tensor or setting that the
    adapter does not hold (`allow` leaves such a difference out, by its name or its end after a dot); TargetError
    as `match` does, also where the rank is more than a weight has.
    """
    _check_shapes(base, tuned)
    coverage = match(base.model, config)
    if coverage.uneven:
        raise TargetError("target_modules", "; ".join(coverage.uneven), hint="name targets of every layer")
    modules = dict(base_modules(base.model))
    check_start(config, coverage.targets, modules)
    weights = _Pair(base, tuned)
    biased = {
        t.path: f"{t.path}.bias" for t in coverage.targets if config.lora_bias and has_bias(modules[t.path])
    }
    held = {t.site.tensor for t in coverage.targets} | set(biased.values())
    left = _check_rest(weights, held, coverage.full, allow)
    fits: dict[str, Fit] = {}
    low: dict[str, LowRank] = {}
    for target in coverage.targets:
        low[target.path], fits[target.path] = _update(target, *weights.read(target.site.tensor))
        if target.path in biased:
            old, new = (tensor.double() for tensor in weights.read(biased[target.path]))
            low[target.path] = low[target.path]._replace(bias=(new - old).float())
    if not any(fit.norm for fit in fits.values()) and not coverage.full:
        raise BaseMismatch("extract an adapter", "none of the targets differs between the two models")
    full = {path: _whole(weights, modules[path], path) for path in coverage.full}
    return Extraction(_adapter(base, tuned, config, coverage, (low, full)), fits, left)


def _adapter(
    base: Skeleton, tuned: Skeleton, config: LoraConfig, coverage: Coverage, held: tuple[Any, Any]
) -> Adapter:
    names = names_for(base.model, coverage.targets)
    resolved = replace(
        config,
        target_modules=names.modules,
        target_parameters=names.parameters,
        exclude_modules=(),
        modules_to_save=coverage.full,
    )
    facts = {"tuned": str(tuned.folder), "tuned fingerprint": tuned.fingerprint, "rank": config.rank}
    origin = Origin(str(base.folder), base.fingerprint, training={"extracted": facts})
    return Adapter(resolved, *held, origin)


class _Pair:
    """Two stored models of one architecture, whose parameters are read by name, one at a time."""

    def __init__(self, base: Skeleton, tuned: Skeleton) -> None:
        self.base, self.tuned = base, tuned

    def names(self) -> Iterator[str]:
        """The parameters and buffers that either of the files holds, a tied one once, unless only one ties it."""
        for name in self.base.model.state_dict():
            if not (name in self.base.ties and name in self.tuned.ties):
                yield name

    def read(self, name: str) -> tuple[Tensor, Tensor]:
        """The base's tensor and the tuned model's, as they are stored."""
        return read_parameter(self.base, name), read_parameter(self.tuned, name)

    def differ(self, name: str) -> bool:
        """Whether the two are not the same values, at the coarser of their dtypes."""
        if not all(self.stored(name)):
            return any(self.stored(name))
        old, new = self.read(name)
        coarse = min(old.dtype, new.dtype, key=lambda dtype: dtype.itemsize)
        return not torch.equal(old.to(coarse), new.to(coarse))

    def stored(self, name: str) -> list[bool]:
        """Which of the two have the tensor in their files: older ones leave buffers out."""
        return [bool(stored_name(one, name) or _fusion_of(one, name)) for one in (self.base, self.tuned)]


def _fusion_of(base: Skeleton, name: str) -> Fusion | None:
    return next((fusion for fusion in base.fusions if name in fusion.parameters), None)


def read_parameter(base: Skeleton, name: str) -> Tensor:
    """A stored model's parameter, also where its files hold it in pieces. Raises BaseMismatch where they do not."""
    infos = {info.name: info for info in base.tensors}
    if stored := stored_name(base, name):
        return read_tensor(infos[stored])
    if (fusion := _fusion_of(base, name)) is not None:
        return fusion.join({source: read_tensor(infos[source]) for source in fusion.sources})[name]
    raise BaseMismatch(f"read {name}", f"the files in {base.folder} hold no tensor for it")


def _check_shapes(base: Skeleton, tuned: Skeleton) -> None:
    asked = f"the difference of {tuned.folder} and {base.folder}"
    kinds = [type(one.model).__name__ for one in (base, tuned)]
    if kinds[0] != kinds[1]:
        raise BaseMismatch(asked, f"the base is a {kinds[0]}, the tuned model a {kinds[1]}")
    mine, theirs = ({n: tuple(t.shape) for n, t in one.model.state_dict().items()} for one in (base, tuned))
    odd = [
        f"{name}: {mine.get(name, 'nothing')} in the base, {theirs.get(name, 'nothing')} in the tuned model"
        for name in dict.fromkeys([*mine, *theirs])
        if mine.get(name) != theirs.get(name)
    ]
    if odd:
        raise BaseMismatch(asked, f"the shapes differ{_lines(odd)}")


def _check_rest(weights: _Pair, held: set[str], full: Sequence[str], allow: Sequence[str]) -> tuple[str, ...]:
    """The differences that the adapter does not hold, all of them allowed."""
    settings = dict(_settings(weights.base.model, weights.tuned.model))
    names, told = [*weights.names()], [*settings]
    known = [*names, *told, *(path for path, _ in base_modules(weights.base.model))]
    ends = dict.fromkeys(name.removesuffix(".weight").rpartition(".")[2] for name in known)
    for one in allow:
        if not any(name_matches(one, name) for name in known):
            found = "no tensor, module or differing setting is called so"
            raise ConfigError(f"option allow={one}", found, nearest(one, ends))
    inside = tuple(f"{path}." for path in full)
    rest = [name for name in _untied(weights, names) if name not in held and not name.startswith(inside)]
    # Tensors that must be equal are read only to be compared: those that may differ are looked at too, to be told.
    differing = [*(f"{name}: {text}" for name, text in settings.items()), *filter(weights.differ, rest)]
    refused = [text for text in differing if not _allowed(text.partition(": ")[0], allow)]
    if refused:
        hint = (
            "--modules-to-save MODULE takes a module whole, --allow NAME leaves its change out of the adapter"
        )
        if any(name.endswith(".bias") for name in refused):
            hint += ", --lora-bias moves the targets' biases"
        asked = f"{len(refused)} tensors or settings differ, and the adapter would not hold the change"
        raise BaseMismatch(asked, _lines(refused), hint=hint)
    return tuple(differing)


def _untied(weights: _Pair, names: Iterable[str]) -> Iterator[str]:
    """The names, and those of shared weights: an adapter that changes one of two tied layers leaves the other."""
    yield from names
    yield from (name for name in weights.base.ties if name in weights.tuned.ties)


def _allowed(name: str, allow: Sequence[str]) -> bool:
    """Whether the difference, or a module around it, is named."""
    parts = name.split(".")
    return any(name_matches(one, ".".join(parts[:end])) for one in allow for end in range(1, len(parts) + 1))


def _settings(base: nn.Module, tuned: nn.Module) -> Iterator[tuple[str, str]]:
    """The settings that both configurations have with other values, and what they are."""
    mine, theirs = (dict(_flat(getattr(model, "config").to_dict())) for model in (base, tuned))  # noqa: B009
    for name in mine.keys() & theirs.keys():
        old, new = mine[name], theirs[name]
        if None in (old, new) or name.endswith(_IDLE) or old == new:
            continue
        if (
            isinstance(old, int | float)
            and isinstance(new, int | float)
            and math.isclose(old, new, rel_tol=1e-6)
        ):
            continue  # GGUF has its numbers in float32
        yield SETTING + name, f"{old} in the base, {new} in the tuned model"


def _flat(values: Mapping[str, Any], before: str = "") -> Iterator[tuple[str, Any]]:
    for name, value in values.items():
        if isinstance(value, dict):
            yield from _flat(value, f"{before}{name}.")
        else:
            yield f"{before}{name}", value


def _lines(texts: Sequence[str], count: int = 20) -> str:
    more = [f"... and {len(texts) - count} more"] if len(texts) > count else []
    return "\n  " + "\n  ".join([*sorted(texts)[:count], *more])


def _update(target: Target, old: Tensor, new: Tensor) -> tuple[LowRank, Fit]:
    """The best update of the target's rank, block by block, and how well it fits."""
    site, parts = target.site, list[tuple[Tensor, Tensor]]()
    norms, errors = list[float](), list[float]()
    for before, after in zip(blocks_of(site, old), blocks_of(site, new), strict=True):
        change = after.double() - before
        if not change.isfinite().all():
            raise BaseMismatch(f"the difference at {target.path}", "it holds NaN or infinity")
        a, b = _rounded(*best_fit(change, target.rank), target.rank)
        parts.append((a, b))
        norms.append(float(change.norm()))
        errors.append(float(torch.addmm(change, b.double(), a.double(), alpha=-1).norm()))
    a, b = (torch.cat(side) for side in zip(*parts, strict=True))
    norm = math.hypot(*norms)
    fit = Fit(norm, math.hypot(*errors) / norm if norm else 0.0)
    return LowRank(a, b, 1.0, site.kind, site.blocks, site.kernel), fit


def _rounded(a_ri: Tensor, b_or: Tensor, rank: int) -> tuple[Tensor, Tensor]:
    """The factors in float32, each with half of every singular value; zeros behind where the weight has fewer.

    Where W' = W one factor stays as it is, so that the adapter can learn.
    """
    sizes_a, sizes_b = a_ri.norm(dim=1), b_or.norm(dim=0)
    share = torch.where(sizes_a * sizes_b > 0, (sizes_b / sizes_a).sqrt(), 1.0)
    a, b = torch.zeros(rank, a_ri.shape[1]), torch.zeros(b_or.shape[0], rank)
    a[: len(share)], b[:, : len(share)] = (a_ri * share[:, None]).float(), (b_or / share).float()
    return a, b


def _whole(weights: _Pair, module: nn.Module, path: str) -> dict[str, Tensor]:
    """The tuned model's own tensors of a module, float32."""
    return {name: read_parameter(weights.tuned, f"{path}.{name}").float() for name in module.state_dict()}
