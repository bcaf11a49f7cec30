"""One optimiser step: forward and backward over its batches, clipped, checked, applied."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import NamedTuple

import torch
from torch import nn

from onebase.data.template import Encoded
from onebase.errors import Diverged, TargetError
from onebase.models.scoring import Loss, loss_tokens
from onebase.training.distributed import World


class Given(NamedTuple):
    """A step's gradients, which the parameters hold: the mean loss over its targets (nats), their number, and the
    seconds that this took."""

    loss: float
    targets: int
    seconds: float


class StepResult(NamedTuple):
    """What a step did: mean loss over its targets (nats), norm of the gradient before clipping, token counts."""

    loss: float
    grad_norm: float
    loss_tokens: int
    tokens: int


def gradients(loss: Loss, batches: Sequence[Sequence[Encoded]]) -> tuple[float, int]:
    """Add the gradient of the step's mean loss to the parameters; returns that loss and its number of targets.

    Every batch is divided by the targets of the whole step, so the gradient does not depend on how the rows
    are cut into batches (peers that average the batches' means weigh a token by its batch).
    """
    count = sum(loss_tokens(rows) for rows in batches)
    total = 0.0
    for rows in batches:
        mean = loss(rows) / max(count, 1)
        if mean.requires_grad:  # not where every adapted module is unused, which check_used reports
            mean.backward()
        total += float(mean.detach())
    return total, count


def train_step(
    loss: Loss,
    parameters: Mapping[str, nn.Parameter],
    optimizer: torch.optim.Optimizer,
    batches: Sequence[Sequence[Encoded]],
    clip: float,
    world: World = World(),  # noqa: B008
) -> StepResult:
    """One step of AdamW. Raises Diverged, before any parameter changes, where loss or gradient is not finite.

    Of several processes each calls it with the whole batches and a loss of its own share of their rows.
    """
    optimizer.zero_grad(set_to_none=True)
    part, count = gradients(loss, batches)
    mean = world.total(part)
    world.sum_gradients(list(parameters.values()))
    norm = apply_gradients(parameters, optimizer, mean, clip)
    return StepResult(mean, norm, count, sum(len(row.ids) for rows in batches for row in rows))


def apply_gradients(
    parameters: Mapping[str, nn.Parameter], optimizer: torch.optim.Optimizer, mean: float, clip: float
) -> float:
    """Let the optimiser use the parameters' gradients; returns their norm before clipping.

    Raises Diverged, before any parameter changes, where the loss or a gradient is not finite.
    """
    graded = [p for p in parameters.values() if p.grad is not None]
    norm = nn.utils.clip_grad_norm_(graded, clip if clip else float("inf"), error_if_nonfinite=False)
    if not torch.isfinite(norm) or mean != mean or abs(mean) == float("inf"):
        optimizer.zero_grad(set_to_none=True)
        raise Diverged("training", f"loss {mean}, gradient norm {float(norm)}")
    optimizer.step()
    return float(norm)


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
