"""The loss of a batch: of its text, with logits only where there is loss, of its rows' labels, or of its pairs."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Sequence
from contextlib import nullcontext
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from onebase.data.labels import CLASSIFY, REGRESS, Head
from onebase.data.pack import Batch, attention_mask, bucketed, targets
from onebase.data.pairs import columns, false_negatives
from onebase.data.template import Encoded
from onebase.models.embedder import Embedder, pool
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
    ids, mask = _filled([row.ids for row in rows], pad_id, next(model.parameters()).device)
    types: dict[str, Tensor] = {}
    if any(row.types for row in rows):
        types = {"token_type_ids": _filled([row.types for row in rows], 0, ids.device)[0]}
    return model(input_ids=ids, attention_mask=mask, **types).logits.float()


def _filled(rows: Sequence[Sequence[int]], fill: int, device: torch.device) -> tuple[Tensor, Tensor]:
    """(rows, longest) int64: the rows filled up on the right, and 1 where a row has its own."""
    width = max(map(len, rows))
    ids = torch.tensor([[*row, *[fill] * (width - len(row))] for row in rows])
    mask = torch.tensor([[1] * len(row) + [0] * (width - len(row)) for row in rows])
    return ids.to(device), mask.to(device)


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


def text_vectors(
    model: nn.Module, texts: Sequence[Sequence[int]], embedder: Embedder, pad_id: int, batch_size: int
) -> Tensor:
    """The vector of each text, (texts, width) in float32. Texts of like length share a forward pass."""
    device, found = next(model.parameters()).device, dict[int, Tensor]()
    for batch in bucketed([len(text) for text in texts], batch_size):
        ids, mask = _filled([texts[index] for index in batch], pad_id, device)
        states = model(input_ids=ids, attention_mask=mask)[0]
        found |= dict(zip(batch, pool(states, mask, embedder), strict=True))
    return torch.stack([found[index] for index in range(len(texts))])


def pair_loss(model: nn.Module, rows: Sequence[Encoded], embedder: Embedder, pad_id: int) -> Tensor:
    """The summed loss (nats) of rows of anchor, positive and maybe negative, each other's negatives; a scalar.

    Semantics: s_ij = scale · cos(a_i, c_j), c = [positives; negatives]; the sum over i of -log softmax_j(s_ij) at
    j = i, without the j that the rows tell to be as right (`false_negatives`).
    InfoNCE (van den Oord et al. 2018, arXiv:1807.03748) over the batch, as in Henderson et al. 2017 (arXiv:1705.00652,
    section 4.4); sentence-transformers' MultipleNegativesRankingLoss, which masks nothing and takes the mean.
    """
    parts = columns(rows)
    vectors = text_vectors(model, [text for part in parts for text in part], embedder, pad_id, len(rows))
    return contrastive_loss(vectors, false_negatives(rows), embedder.scale)


def contrastive_loss(vectors: Tensor, excluded: Tensor, scale: float) -> Tensor:
    """`pair_loss` of vectors: (N anchors and C candidates, width), with the (N, C) candidates that do not count."""
    unit = F.normalize(vectors, dim=-1)
    anchors, candidates = unit[: len(excluded)], unit[len(excluded) :]
    scores = (scale * anchors @ candidates.T).masked_fill(excluded.to(unit.device), float("-inf"))
    return F.cross_entropy(scores, torch.arange(len(scores), device=unit.device), reduction="sum")


def keeps_logits(model: nn.Module) -> bool:
    """Whether the model's forward can be told for which tokens to give logits."""
    return "logits_to_keep" in inspect.signature(model.forward).parameters
