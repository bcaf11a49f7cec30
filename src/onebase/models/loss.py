"""The loss of a batch: of its text, with logits only where there is loss, or of its rows' labels."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Sequence
from contextlib import nullcontext
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from onebase.data.labels import CLASSIFY, REGRESS, Head
from onebase.data.pack import Batch, attention_mask, targets
from onebase.data.template import Encoded
from onebase.models.packing import segments


def loss_sum(model: nn.Module, batch: Batch) -> tuple[Tensor, int]:
    """The summed cross-entropy (nats, a float32 scalar) of a batch's targets, and how many there are.

    A sum, not a mean: the caller divides by the targets of the whole step, so that the loss does not depend
    on how a step is cut into batches.
    """
    device = next(model.parameters()).device
    wanted = targets(batch)
    columns = wanted.columns.unique()
    keep: dict[str, Any] = {"logits_to_keep": columns.to(device)} if keeps_logits(model) else {}
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


def head_outputs(model: nn.Module, rows: Sequence[Encoded], pad_id: int) -> Tensor:
    """What a model with a head gives for each row, (rows, outputs) in float32: logits of classes, or a number.

    Rows are filled up on the right. A decoder's head reads the last token that is not padding.
    """
    device, width = next(model.parameters()).device, max(len(row.ids) for row in rows)
    ids = torch.tensor([row.ids + [pad_id] * (width - len(row.ids)) for row in rows])
    mask = torch.tensor([[1] * len(row.ids) + [0] * (width - len(row.ids)) for row in rows])
    types: dict[str, Tensor] = {}
    if any(row.types for row in rows):
        filled = [[*row.types, *[0] * (width - len(row.types))] for row in rows]
        types = {"token_type_ids": torch.tensor(filled, device=device)}
    return model(input_ids=ids.to(device), attention_mask=mask.to(device), **types).logits.float()


def label_loss(head: Head, outputs: Tensor, rows: Sequence[Encoded]) -> Tensor:
    """The summed loss of the rows that have a label: cross-entropy (nats) of classes, squared error of numbers."""
    known = [place for place, row in enumerate(rows) if row.label is not None]
    wanted = torch.tensor([rows[place].label for place in known], device=outputs.device)
    return LABEL_LOSSES[head.task](outputs[known], wanted)


# Task -> (outputs (N, n), labels (N,)) -> the sum over rows.
LABEL_LOSSES: dict[str, Callable[[Tensor, Tensor], Tensor]] = {
    CLASSIFY: lambda outputs, labels: F.cross_entropy(outputs, labels.long(), reduction="sum"),
    REGRESS: lambda outputs, labels: F.mse_loss(outputs[:, 0], labels.float(), reduction="sum"),
}


def keeps_logits(model: nn.Module) -> bool:
    """Whether the model's forward can be told for which tokens to give logits."""
    return "logits_to_keep" in inspect.signature(model.forward).parameters
