"""Whether the fast runner computes a model: proved on the model itself before anything is served."""

from __future__ import annotations

from dataclasses import replace
from typing import Any, NamedTuple

import torch

from onebase.adapters.adapter import Adapter
from onebase.adapters.injection import injected, new_adapter
from onebase.config import LoraConfig
from onebase.errors import ConfigError, OnebaseError, nearest
from onebase.models.reading import Unsupported
from onebase.serve.runner import Row, Runner
from onebase.serve.weights import AUTOMATIC, PRODUCTS, Holder, remembered

# Largest difference of logits, as a part of the largest logit; wider for narrower types.
TOLERANCE = {torch.float64: 1e-6, torch.float32: 1e-4}
NARROW_TOLERANCE = 5e-2
ROUNDED = {"int8": 0.1, "int4": 0.5}  # what fewer bits explain; benchmarks/decode.py has what they cost
AUTO = "auto"
CUTS = (5, 8, 9)  # a row comes in a chunk, another chunk and a single token


class Choice(NamedTuple):
    """A row of `weights.PRODUCTS`, how it holds the layers, and why there is none if there is none."""

    product: str
    hold: Holder | None
    problem: str = ""


def choose_product(model: Any, weights: str = AUTO) -> Choice:
    """The way to compute this model: the one asked for, or the first of `AUTOMATIC` that is proved.

    Raises ConfigError where there is no such way, or the one asked for cannot be or fails its proof.
    """
    if weights not in (AUTO, *PRODUCTS):
        raise ConfigError(f"option weights={weights}", "no such way", nearest(weights, [AUTO, *PRODUCTS]))
    why = ""
    for name in AUTOMATIC if weights == AUTO else (weights,):
        make = PRODUCTS[name]
        hold = remembered(make) if make else None
        why = runner_problem(model, hold, ROUNDED.get(name, 0.0))
        if not why:
            return Choice(name, hold)
    if weights not in (AUTO, "plain"):
        raise ConfigError(f"option weights={weights}", why, hint=f"{AUTO} takes what can be")
    return Choice("", None, why)


def runner_problem(model: Any, hold: Holder | None = None, allowed: float = 0.0) -> str:
    """Why the runner does not compute this model, in one sentence; empty where it is proved exact.

    A row without adapter and one with a random adapter on every linear layer go through the runner together, in
    pieces, and through the model's own forward, alone and whole. The model is as before. `allowed`: how far the logits
    may be apart, as a part of the largest; 0 for what the model's dtype explains.
    """
    try:
        runner = Runner(model, slots=2, context=CUTS[-1], hold=hold)
        adapter = _stirred(new_adapter(model, LoraConfig(rank=2, alpha=4.0)))
    except (Unsupported, OnebaseError) as error:
        return error.found
    if why := runner.problem(adapter):
        return f"it does not know every linear layer: {why}"
    draw = torch.Generator().manual_seed(0)
    tokens = torch.randint(model.config.vocab_size, (2, CUTS[-1]), generator=draw)
    for slot, one in enumerate((None, adapter)):
        runner.put(slot, one)
    theirs = torch.stack(
        [_own_logits(model, row, one) for row, one in zip(tokens, (None, adapter), strict=True)]
    )
    start, worst = 0, 0.0
    for stop in CUTS:
        ours = runner.forward([Row(slot, tokens[slot, start:stop].tolist(), start) for slot in range(2)])
        apart = (ours - theirs[:, stop - 1]).abs().max() / theirs.abs().max()
        worst, start = max(worst, float(apart.nan_to_num(nan=torch.inf))), stop
    allowed = allowed or TOLERANCE.get(model.dtype, NARROW_TOLERANCE)
    return (
        "" if worst <= allowed else f"the logits differ by {worst:.1e} of the largest ({allowed:.0e} allowed)"
    )


def _own_logits(model: Any, row: torch.Tensor, adapter: Adapter | None) -> torch.Tensor:
    with torch.inference_mode(), injected(model, adapter, "onebase-proof"):
        return model(input_ids=row[None].to(model.device), use_cache=False).logits[0].float()


def _stirred(adapter: Adapter) -> Adapter:
    """The adapter with every B away from 0."""
    draw = torch.Generator().manual_seed(1)
    low = {
        path: one._replace(B=torch.randn(one.B.shape, generator=draw) * 0.02)
        for path, one in adapter.lowrank.items()
    }
    return replace(adapter, lowrank=low)
