"""Adapters for tests: as training would leave them, in every variant."""

from dataclasses import replace

import torch

from onebase.adapters.adapter import Adapter, Origin
from onebase.adapters.injection import new_adapter
from onebase.adapters.targets import adaptable
from onebase.config import LoraConfig

VARIANTS = {
    "lora": {"rank": 4, "alpha": 8},
    "rslora": {"rank": 4, "alpha": 8, "rslora": True},
    "patterns": {"rank": 4, "alpha": 8},
}
FIRST_LAYER = {"gpt2": r"h\.0\..*", "bert": r"layer\.0\..*"}


def options_for(arch: str, variant: str) -> dict:
    """LoraConfig options of a variant; patterns single out the first layer."""
    key = FIRST_LAYER.get(arch, r"layers\.0\..*")
    patterns = {"rank_pattern": {key: 2}, "alpha_pattern": {key: 3.0}} if variant == "patterns" else {}
    return VARIANTS[variant] | patterns


def trained(model, config: LoraConfig, seed: int = 0) -> Adapter:
    """An adapter as training would leave it: every factor away from 0."""
    task = "CAUSAL_LM" if hasattr(model, "lm_head") else ""
    adapter = new_adapter(model, config, seed, Origin("base", task=task))
    generator = torch.Generator().manual_seed(seed + 1)

    def noise(tensor, size):
        return torch.randn(tensor.shape, generator=generator) * size

    def moved(low):
        vectors = {n: t + noise(t, 0.2) for n, t in low.tensors().items() if n not in ("A", "B")}
        return low._replace(A=noise(low.A, 0.2), B=noise(low.B, 0.2), **vectors)

    low = {path: moved(one) for path, one in adapter.lowrank.items()}
    full = {p: {n: t + noise(t, 0.1) for n, t in state.items()} for p, state in adapter.full.items()}
    tokens = {p: t._replace(rows=t.rows + noise(t.rows, 0.2)) for p, t in adapter.tokens.items()}
    return replace(adapter, lowrank=low, full=full, tokens=tokens)


def every_kind(model) -> LoraConfig:
    """A config that targets every module that can carry an update, embeddings and head too."""
    names = sorted({path.rsplit(".", 1)[-1] for path in adaptable(model)})
    return LoraConfig(rank=2, alpha=6, target_modules=names)
