"""One optimiser step: forward and backward over its batches, clipped, checked, applied."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import NamedTuple

import torch
from torch import nn

from onebase.data.pack import Batch, targets
from onebase.errors import Diverged, TargetError
from onebase.models.loss import loss_sum


class StepResult(NamedTuple):
    """What a step did: mean loss over its targets (nats), norm of the gradient before clipping, token counts."""

    loss: float
    grad_norm: float
    loss_tokens: int
    tokens: int


def gradients(model: nn.Module, batches: Sequence[Batch]) -> tuple[float, int]:
    """Add the gradient of the step's mean loss to the parameters; returns that loss and its number of targets.

    Every batch is divided by the targets of the whole step, so the gradient does not depend on how the rows
    are cut into batches (peers that average the batches' means weigh a token by its batch).
    """
    count = sum(len(targets(batch).ids) for batch in batches)
    total = 0.0
    for batch in batches:
        loss = loss_sum(model, batch)[0] / max(count, 1)
        if loss.requires_grad:  # not where every adapted module is unused, which check_used reports
            loss.backward()
        total += float(loss.detach())
    return total, count


def train_step(
    model: nn.Module,
    parameters: Mapping[str, nn.Parameter],
    optimizer: torch.optim.Optimizer,
    batches: Sequence[Batch],
    clip: float,
) -> StepResult:
    """One step of AdamW. Raises Diverged, before any parameter changes, where loss or gradient is not finite."""
    optimizer.zero_grad(set_to_none=True)
    loss, count = gradients(model, batches)
    graded = [p for p in parameters.values() if p.grad is not None]
    norm = nn.utils.clip_grad_norm_(graded, clip if clip else float("inf"), error_if_nonfinite=False)
    if not torch.isfinite(norm) or loss != loss or abs(loss) == float("inf"):
        optimizer.zero_grad(set_to_none=True)
        raise Diverged("training", f"loss {loss}, gradient norm {float(norm)}")
    optimizer.step()
    return StepResult(loss, float(norm), count, sum(sum(batch.lengths) for batch in batches))


def check_used(parameters: Mapping[str, nn.Parameter]) -> None:
    """Raise TargetError where a parameter got no gradient at all: its module took no part in the forward pass.

    Models do bypass their own layers (reading a weight instead of calling the layer), and an adapter there
    would silently have no effect.
    """
    unused = sorted({name.rsplit(".", 1)[0] for name, p in parameters.items() if p.grad is None})
    if unused:
        raise TargetError(
            "gate unused-adapter",
            f"{len(unused)} adapted modules took no part in the first step: {', '.join(unused[:5])}",
            hint="leave them out with --exclude-modules, or go on with --allow unused-adapter",
        )
