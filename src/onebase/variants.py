"""How an update starts and how it is scaled: tables, a row for each choice."""

from __future__ import annotations

import hashlib
import math
from collections.abc import Callable

import torch
from torch import Tensor

from onebase.adapter import LowRank
from onebase.kinds import Target

Init = Callable[[int, int, torch.Generator], Tensor]
"""(rank, in features, generator) -> A of shape (rank, in)."""


def _kaiming(rank: int, features: int, generator: torch.Generator) -> Tensor:
    """PEFT's and microsoft/LoRA's start: Kaiming-uniform, a = sqrt(5), that is U(-1/sqrt(in), 1/sqrt(in))."""
    bound = 1 / math.sqrt(features)
    return torch.empty(rank, features).uniform_(-bound, bound, generator=generator)


def _gaussian(rank: int, features: int, generator: torch.Generator) -> Tensor:
    """Normal with standard deviation 1/rank (PEFT's init_lora_weights="gaussian")."""
    return torch.empty(rank, features).normal_(0.0, 1 / rank, generator=generator)


INITS: dict[str, Init] = {"default": _kaiming, "gaussian": _gaussian}


def scaling(rank: int, alpha: float, rslora: bool) -> float:
    """s in W + s·B·A: alpha/r (Hu et al. 2021), or alpha/sqrt(r) (rsLoRA, Kalajdzievski 2023)."""
    return alpha / math.sqrt(rank) if rslora else alpha / rank


def start(target: Target, init: str, seed: int) -> LowRank:
    """The update that a target starts with; B·A = 0, so the base's output does not change.

    Each draws from a generator of its own, seeded by (seed, path), so that its start does not depend on which
    other modules are adapted. An embedding starts the other way round, A = 0 and B normal, as in microsoft/LoRA
    and PEFT.
    """
    site, generator = target.site, generator_for(target.path, seed)
    (features, out), ranks = site.shape, target.rank * site.blocks
    if site.kind == "embedding":
        a, b = torch.zeros(ranks, features), torch.randn(out, target.rank, generator=generator)
    else:
        a, b = INITS[init](ranks, features, generator), torch.zeros(site.blocks * out, target.rank)
    return LowRank(a, b, target.scale, site.kind, site.blocks, site.kernel)


def generator_for(path: str, seed: int) -> torch.Generator:
    """Random numbers that depend on the seed and the path alone."""
    digest = hashlib.sha256(f"{seed}:{path}".encode()).digest()
    return torch.Generator().manual_seed(int.from_bytes(digest[:8], "little") >> 1)
