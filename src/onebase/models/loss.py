"""The loss of a batch, with logits only where there is loss; packed and padded batches give the same."""

from __future__ import annotations

import inspect
from contextlib import nullcontext
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from onebase.data.pack import Batch, attention_mask, targets
from onebase.models.packing import segments


def loss_sum(model: nn.Module, batch: Batch) -> tuple[Tensor, int]:
    """The summed cross-entropy (nats, a float32 scalar) of a batch's targets, and how many there are.

    A sum, not a mean: the caller divides by the targets of the whole step, so that the loss does not depend
    on how a step is cut into batches.
    """
    device = next(model.parameters()).device
    wanted = targets(batch)
    columns = wanted.columns.unique()
    keep: dict[str, Any] = {"logits_to_keep": columns.to(device)} if _keeps_logits(model) else {}
    mask = None if batch.packed else attention_mask(batch).to(device)
    with segments(batch.lengths) if batch.packed else nullcontext():
        logits = model(
            input_ids=batch.ids.to(device),
            attention_mask=mask,
            position_ids=batch.positions.to(device),
            use_cache=False,
            **keep,
        ).logits
    places = torch.searchsorted(columns, wanted.columns) if keep else wanted.columns
    chosen = logits[0] if batch.packed and keep else logits[wanted.rows.to(device), places.to(device)]
    return F.cross_entropy(chosen.float(), wanted.ids.to(device), reduction="sum"), len(wanted.ids)


def _keeps_logits(model: nn.Module) -> bool:
    return "logits_to_keep" in inspect.signature(model.forward).parameters
