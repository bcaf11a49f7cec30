"""Whether the fast runner computes a model: proved on the model itself before anything is served."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import torch

from onebase.adapters.adapter import Adapter
from onebase.adapters.injection import injected, new_adapter
from onebase.config import LoraConfig
from onebase.errors import OnebaseError
from onebase.models.reading import Unsupported
from onebase.serve.runner import Row, Runner

# Largest difference of logits, as a part of the largest logit; wider for narrower types.
TOLERANCE = {torch.float64: 1e-6, torch.float32: 1e-4}
NARROW_TOLERANCE = 5e-2
CUTS = (5, 8, 9)  # a row comes in a chunk, another chunk and a single token


def runner_problem(model: Any, product: str = "plain") -> str:
    """Why the runner does not compute this model, in one sentence; empty where it is proved exact.

    A row without adapter and one with a random adapter on every linear layer go through the runner together, in
    pieces, and through the model's own forward, alone and whole. The model is as before.
    """
    try:
        runner = Runner(model, slots=2, context=CUTS[-1], product=product)
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
    allowed = TOLERANCE.get(model.dtype, NARROW_TOLERANCE)
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
