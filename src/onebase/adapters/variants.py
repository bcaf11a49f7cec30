"""How an update starts and how it is scaled: a table with a row for each start."""

from __future__ import annotations

import hashlib
import math
from collections.abc import Callable, Iterable, Mapping
from dataclasses import replace
from typing import Literal, NamedTuple

import torch
from torch import Tensor, nn

from onebase.adapters.adapter import LayerKind, LowRank, joined
from onebase.adapters.kinds import KINDS, Target, as_rows, blocks_of, is_parameter
from onebase.config import LoraConfig
from onebase.errors import ConfigError, TargetError
from onebase.ops.lowrank import row_norms

# Shape suffixes: i = in features, o = out features, r = rank, g = blocks.

Need = Literal["nothing", "weight", "inputs", "gradients"]
"""What a start looks at: nothing, W, or what a pass over data gathered (`calibration.observed`)."""

LORA_GA_GAMMA = 16.0  # PEFT's stable_gamma


class Given(NamedTuple):
    """What a start may look at, for one target."""

    target: Target
    draw: torch.Generator
    weight_goi: Tensor | None = None  # W, in at least float32
    seen: Tensor | None = None  # the inputs' scatter (i, i), or the gradient of W (o, i)


class Init(NamedTuple):
    """A start. `begin` gives A (g, r, i) and B (g, o, r).

    `taken`: B·A is not 0 and is taken out of W. As the base is never written to, the update also holds -B·A, fixed.
    """

    begin: Callable[[Given], tuple[Tensor, Tensor]]
    needs: Need = "nothing"
    taken: bool = False
    kinds: tuple[LayerKind, ...] = tuple(KINDS)


def _beside_zero(a_gri: Tensor, out: int) -> tuple[Tensor, Tensor]:
    """A, and B = 0."""
    return a_gri, torch.zeros(a_gri.shape[0], out, a_gri.shape[1])


def _drawn(fill: Callable[[Tensor, Given], Tensor]) -> Callable[[Given], tuple[Tensor, Tensor]]:
    """A start with a random A and B = 0; an embedding's is the other way round (microsoft/LoRA, PEFT)."""

    def begin(given: Given) -> tuple[Tensor, Tensor]:
        site, rank = given.target.site, given.target.rank
        features, out = site.shape
        if site.kind == "embedding":
            return torch.zeros(1, rank, features), torch.randn(1, out, rank, generator=given.draw)
        return _beside_zero(fill(torch.empty(site.blocks, rank, features), given), out)

    return begin


def _kaiming(a_gri: Tensor, given: Given) -> Tensor:
    """Kaiming-uniform with a = sqrt(5), that is U(-1/sqrt(in), 1/sqrt(in)): microsoft/LoRA's and PEFT's start."""
    bound = 1 / math.sqrt(a_gri.shape[-1])
    return a_gri.uniform_(-bound, bound, generator=given.draw)


def _gaussian(a_gri: Tensor, given: Given) -> Tensor:
    """Normal with standard deviation 1/rank (PEFT's init_lora_weights="gaussian")."""
    return a_gri.normal_(0.0, 1 / given.target.rank, generator=given.draw)


def _orthogonal(given: Given) -> tuple[Tensor, Tensor]:
    """A and B both random, in halves of the rank's space that are orthogonal, so that B·A = 0 (PEFT's "orthogonal")."""
    site, rank, draw = given.target.site, given.target.rank, given.draw
    features, out = site.shape
    q_rr = torch.linalg.qr(torch.randn(site.blocks, rank, rank, generator=draw)).Q
    a_gri = q_rr[:, 0::2].mT @ torch.randn(site.blocks, rank // 2, features, generator=draw)
    b_gor = torch.randn(site.blocks, out, rank // 2, generator=draw) @ q_rr[:, 1::2]
    return a_gri / 10, b_gor / 10


def _pissa(given: Given) -> tuple[Tensor, Tensor]:
    """s·B·A is W's largest part of this rank, by its singular values (PiSSA, Meng et al. 2024)."""
    assert given.weight_goi is not None
    rank, scale = given.target.rank, given.target.scale
    u_gok, values_gk, v_gki = torch.linalg.svd(given.weight_goi, full_matrices=False)
    root_gr = (values_gk[:, :rank] / abs(scale)).sqrt()
    b_gor = u_gok[:, :, :rank] * root_gr[:, None, :] * math.copysign(1.0, scale)
    return root_gr[:, :, None] * v_gki[:, :rank], b_gor


def _olora(given: Given) -> tuple[Tensor, Tensor]:
    """The first columns of Q and rows of R, W = Q·R: B is orthonormal (OLoRA, Büyükakyüz 2024)."""
    assert given.weight_goi is not None
    q_gok, r_gki = torch.linalg.qr(given.weight_goi)
    rank = given.target.rank
    return r_gki[:, :rank], q_gok[:, :, :rank]


def _eva(given: Given) -> tuple[Tensor, Tensor]:
    """A: the directions in which the layer's inputs vary most; B = 0 (EVA, Paischer et al. 2024)."""
    assert given.seen is not None
    rank, out = given.target.rank, given.target.site.shape[1]
    values, vectors = torch.linalg.eigh(given.seen.double())
    if values[-rank] <= values[-1] * 1e-10:
        raise TargetError(
            f"init eva, rank {rank} for {given.target.path}",
            "the inputs that were seen vary in fewer directions",
            hint="a lower rank, or more and different rows",
        )
    a_ri = vectors.flip(1)[:, :rank].T
    largest = a_ri.gather(1, a_ri.abs().argmax(1, keepdim=True))  # an eigenvector's sign is arbitrary: fix it
    return _beside_zero((a_ri * largest.sign())[None].float(), out)


def _lora_ga(given: Given) -> tuple[Tensor, Tensor]:
    """A and B along the gradient's singular vectors 1 to r and r+1 to 2r (LoRA-GA, Wang et al. 2024).

    PEFT's direction ArB2r and scale stable: A is orthonormal, B carries the singular values times out^(1/4)/sqrt(16).
    """
    assert given.seen is not None
    rank, out = given.target.rank, given.target.site.shape[1]
    u_ok, values_k, v_ki = torch.linalg.svd(given.seen, full_matrices=False)
    factor = out**0.25 / math.sqrt(LORA_GA_GAMMA)
    second = slice(rank, 2 * rank)
    return v_ki[None, :rank], (u_ok[:, second] * values_k[second] * factor)[None]


_MATRICES: tuple[LayerKind, ...] = (
    "linear",
    "transposed",
)  # layers whose inputs and output gradients are rows
_NO_EMBEDDING: tuple[LayerKind, ...] = tuple(kind for kind in KINDS if kind != "embedding")

INITS: dict[str, Init] = {
    "default": Init(_drawn(_kaiming)),
    "gaussian": Init(_drawn(_gaussian)),
    "orthogonal": Init(_orthogonal, kinds=_NO_EMBEDDING),  # PEFT takes the default for an embedding, silently
    "pissa": Init(_pissa, "weight", taken=True),
    "olora": Init(_olora, "weight", taken=True),
    "eva": Init(_eva, "inputs", kinds=_MATRICES),
    "lora_ga": Init(_lora_ga, "gradients", taken=True, kinds=_MATRICES),
}


def scaling(rank: int, alpha: float, rslora: bool) -> float:
    """s in W + s·B·A: alpha/r (Hu et al. 2021), or alpha/sqrt(r) (rsLoRA, Kalajdzievski 2023)."""
    return alpha / math.sqrt(rank) if rslora else alpha / rank


def is_held(config: LoraConfig) -> bool:
    """Whether the second half of each update's ranks is what the start took from W, and stays fixed."""
    return INITS[config.init].taken


def start_scale(rank: int, alpha: float, config: LoraConfig) -> float:
    """The scale of a target of this rank and alpha: for a held start what the stored, doubled rank and alpha give."""
    if is_held(config):
        rank, alpha = 2 * rank, alpha * _alpha_factor(config)
    return scaling(rank, alpha, config.rslora)


def stored_config(config: LoraConfig) -> LoraConfig:
    """The config of an adapter that starts as `config` says: ranks doubled, at the same scale, where a part is held."""
    if not is_held(config):
        return config
    factor = _alpha_factor(config)
    return replace(
        config,
        rank=2 * config.rank,
        alpha=config.alpha * factor,
        rank_pattern={key: 2 * rank for key, rank in config.ranks.items()},
        alpha_pattern={key: alpha * factor for key, alpha in config.alphas.items()},
    )


def _alpha_factor(config: LoraConfig) -> float:
    return math.sqrt(2) if config.rslora else 2.0


def start(
    target: Target, config: LoraConfig, seed: int, module: nn.Module, seen: Tensor | None = None
) -> LowRank:
    """The update that a target starts with, on `module`, which owns the target's weight.

    It changes the base's output by rounding at most, and where B = 0 not at all. `seen` is what a pass over data
    gathered for this target (`calibration.observed`). Each target draws from a generator of its own, seeded by
    (seed, path), so that its start does not depend on which others are adapted.
    """
    site, row = target.site, INITS[config.init]
    given = Given(target, generator_for(target.path, seed))
    if row.needs == "weight":
        weight = module.get_parameter(site.name).detach()
        given = given._replace(weight_goi=blocks_of(site, weight))
    elif row.needs != "nothing":
        given = given._replace(seen=_checked(target, config.init, seen))
    a_gri, b_gor = row.begin(given)
    a, b = (tensor.flatten(0, 1).to(torch.float32) for tensor in (a_gri, b_gor))
    low = LowRank(a, b, target.scale, site.kind, site.blocks, site.kernel)
    if row.taken:
        low = joined(low, low._replace(B=-low.B))
    if config.lora_bias and has_bias(module):
        low = low._replace(bias=torch.zeros(site.shape[1]))
    return low._replace(magnitude=_norms(target, low, module)) if config.dora else low


def _checked(target: Target, init: str, seen: Tensor | None) -> Tensor:
    features, out = target.site.shape
    wanted = (features, features) if INITS[init].needs == "inputs" else (out, features)
    if seen is None or tuple(seen.shape) != wanted:
        found = (
            f"a tensor of shape {tuple(seen.shape)}" if seen is not None else "nothing was gathered for it"
        )
        hint = f"a pass over data gathers it: calibration.observed(model, targets, {init!r})"
        raise TargetError(f"init {init} for {target.path}: {INITS[init].needs} {wanted}", found, hint=hint)
    return seen


def has_bias(module: nn.Module) -> bool:
    """Whether a layer adds a bias, which an update can move."""
    return isinstance(getattr(module, "bias", None), Tensor)


def _norms(target: Target, low: LowRank, module: nn.Module) -> Tensor:
    """DoRA's magnitude, as the forward pass computes the norms: their ratio is 1 at the start, to the bit."""
    norms = row_norms(as_rows(module.get_parameter(target.site.name), low), low.factors)
    if zeros := int((norms == 0).sum()):
        found = f"{zeros} rows of its weight are 0, and DoRA divides by their norms"
        raise TargetError(f"dora for {target.path}", found, hint="leave it out with --exclude-modules")
    return norms


def check_start(config: LoraConfig, targets: Iterable[Target], modules: Mapping[str, nn.Module]) -> None:
    """Raise what a start on these targets cannot be: ConfigError for options, TargetError that lists the targets.

    `modules` are the base's by path. lora_bias gives a bias to the layers that have one, and one there must be.
    """
    targets = list(targets)
    if config.dropout and is_held(config):
        found = "the start's part of W would be dropped too, and W minus it be another matrix at every step"
        raise ConfigError(f"options dropout and init={config.init}", found, hint="use dropout 0")
    problems = [f"{target.path}: {why}" for target in targets if (why := _problem(target, config))]
    if problems:
        more = [f"... and {len(problems) - 8} more"] if len(problems) > 8 else []
        raise TargetError("start of the adapter", "\n  " + "\n  ".join([*problems[:8], *more]))
    if config.lora_bias and targets and not any(has_bias(modules[t.site.owner]) for t in targets):
        raise TargetError("lora_bias", "none of the targeted layers has a bias to add to")


def _problem(target: Target, config: LoraConfig) -> str:
    """Why a target cannot start so, empty if it can."""
    kind, rank = target.site.kind, target.rank
    init, row = config.init, INITS[config.init]
    there = target.site.shape[0] if row.needs == "inputs" else min(target.site.shape)
    needed = {"nothing": 0, "gradients": 2 * rank}.get(row.needs, rank)
    checks = [
        (kind not in row.kinds, f"init {init} is for kinds {', '.join(row.kinds)}; this is a {kind}"),
        (init == "orthogonal" and rank % 2 == 1, f"init orthogonal halves the rank, and {rank} is odd"),
        (needed > there, f"init {init} needs {needed} directions, and the weight has {there}"),
        (config.dora and is_parameter(kind), f"dora is for layers; this is a {kind}"),
        (
            config.lora_bias and (kind == "embedding" or is_parameter(kind)),
            f"lora_bias adds to a layer's bias; this is a {kind}",
        ),
    ]
    return next((why for wrong, why in checks if wrong), "")


class Sizes(NamedTuple):
    """How many values an update has: of each tensor that can be trained, and of the part that is held."""

    A: int
    B: int
    bias: int
    magnitude: int
    held: int


def sizes(target: Target, config: LoraConfig, module: nn.Module) -> Sizes:
    """The sizes of what `start` gives."""
    features, out = target.site.shape
    a, b = (target.rank * target.site.blocks * size for size in (features, out))
    bias = out if config.lora_bias and has_bias(module) else 0
    return Sizes(a, b, bias, out if config.dora else 0, a + b if is_held(config) else 0)


def generator_for(path: str, seed: int) -> torch.Generator:
    """Random numbers that depend on the seed and the path alone."""
    digest = hashlib.sha256(f"{seed}:{path}".encode()).digest()
    return torch.Generator().manual_seed(int.from_bytes(digest[:8], "little") >> 1)
