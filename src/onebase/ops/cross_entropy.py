"""Cross-entropy under a frozen output head, in chunks of rows: the logits never exist whole."""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from onebase.ops.products import product

# Rows whose logits exist at once. Fewer make the head's products small, more leave the cache and cost memory.
CHUNK = 128


class Head(NamedTuple):
    """hidden (M, D) -> logits (M, V): softcap · tanh(scale · (hidden·Wᵀ + bias) / softcap), without tanh if None."""

    weight: Tensor
    bias: Tensor | None = None
    scale: float = 1.0
    softcap: float | None = None


def frozen_cross_entropy(hidden: Tensor, head: Head, rows: Tensor, ids: Tensor, chunk: int = CHUNK) -> Tensor:
    """The sum, in nats, of -log softmax(logits of hidden[rows[i]])[ids[i]] over i: a scalar in at least float32.

    hidden (M, D); rows and ids (N,) int64. A row may have several targets, its logits are computed once. The gradient
    with respect to `hidden` is formed with the loss, chunk by chunk; the head gets none.
    Source: Wijmans et al. 2024, "Cut Your Losses in Large-Vocabulary Language Models" (the idea of never storing the
    logits; theirs computes them twice).
    """
    order = rows.argsort(stable=True)
    return _CrossEntropy.apply(hidden, head, rows[order], ids[order], chunk)  # pyright: ignore[reportReturnType]


class _CrossEntropy(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, hidden: Tensor, head: Head, rows: Tensor, ids: Tensor, chunk: int) -> Tensor:
        wide = torch.promote_types(hidden.dtype, torch.float32)
        wants = ctx.needs_input_grad[0]
        d_hidden = torch.empty_like(hidden) if wants else None
        counts = torch.bincount(rows, minlength=len(hidden)).to(wide)
        starts = range(0, len(hidden), chunk)
        edges = torch.searchsorted(rows, torch.tensor([*starts, len(hidden)], device=rows.device)).tolist()
        total = torch.zeros((), dtype=wide, device=hidden.device)
        for number, start in enumerate(starts):
            own = slice(edges[number], edges[number + 1])
            part = slice(start, start + chunk)
            targets = (rows[own] - start, ids[own])
            logits, slope = _logits(hidden[part], head, wide)
            loss, d_logits = _losses(logits, counts[part], targets, wants)
            total += loss
            if d_hidden is not None and d_logits is not None:
                if slope is not None:
                    d_logits.mul_(slope)
                if head.scale != 1.0:
                    d_logits.mul_(head.scale)
                d_hidden[part] = product(d_logits.to(hidden.dtype), head.weight.T)
        if d_hidden is not None:
            ctx.save_for_backward(d_hidden)
        return total

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor | None, ...]:  # pyright: ignore[reportIncompatibleMethodOverride]
        return ctx.saved_tensors[0] * gradients[0].to(ctx.saved_tensors[0].dtype), None, None, None, None


def _logits(hidden: Tensor, head: Head, wide: torch.dtype) -> tuple[Tensor, Tensor | None]:
    """Logits of a chunk, and the softcap's slope where there is one."""
    logits = product(hidden, head.weight, head.bias).to(wide)
    if head.scale != 1.0:
        logits.mul_(head.scale)
    if head.softcap is None:
        return logits, None
    logits.div_(head.softcap).tanh_()
    slope = 1 - logits.square()
    return logits.mul_(head.softcap), slope


def _losses(
    logits: Tensor, counts: Tensor, targets: tuple[Tensor, Tensor], wants: bool
) -> tuple[Tensor, Tensor | None]:
    """The chunk's summed loss, and its gradient in the logits' own memory: count · softmax less 1 for each target."""
    hit = logits[targets].sum()
    logits.sub_(top := logits.amax(-1, keepdim=True)).exp_()
    mass = logits.sum(-1, keepdim=True)
    loss = torch.dot((mass.log() + top).flatten(), counts) - hit
    if not wants:
        return loss, None
    logits.mul_(counts[:, None] / mass)
    return loss, logits.index_put_(targets, logits.new_tensor(-1.0), accumulate=True)
