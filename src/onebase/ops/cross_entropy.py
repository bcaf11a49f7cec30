"""Cross-entropy under a frozen output head, in chunks of rows: the logits never exist whole."""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from onebase.ops import kernels
from onebase.ops.kernels import natively
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
        wants = ctx.needs_input_grad[0]
        d_hidden = torch.empty_like(hidden) if wants else None
        edges = torch.searchsorted(rows, torch.arange(len(hidden) + 1, device=rows.device))
        wide = torch.promote_types(hidden.dtype, torch.float32)
        total = torch.zeros((), dtype=wide, device=hidden.device)
        for start in range(0, len(hidden), chunk):
            part = slice(start, start + chunk)
            own = edges[start : start + chunk + 1]
            targets = Targets(own - own[0], ids[own[0] : own[-1]])
            y = product(hidden[part], head.weight, head.bias)
            loss, dy = _losses(y, targets, head, wants)
            total += loss
            if d_hidden is not None and dy is not None:
                d_hidden[part] = product(dy, head.weight.T)
        if d_hidden is not None:
            ctx.save_for_backward(d_hidden)
        return total

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor | None, ...]:  # pyright: ignore[reportIncompatibleMethodOverride]
        return ctx.saved_tensors[0] * gradients[0].to(ctx.saved_tensors[0].dtype), None, None, None, None


class Targets(NamedTuple):
    """What rows are to be: row r wants each of ids[edges[r] : edges[r + 1]]."""

    edges: Tensor
    ids: Tensor

    @property
    def counts(self) -> Tensor:
        return self.edges.diff()


def _native_losses(y: Tensor, targets: Targets, head: Head, wants: bool) -> tuple[Tensor, Tensor | None]:
    if not kernels.by_row(y):
        return NotImplemented
    counts, losses = targets.counts.float(), torch.empty(len(y))
    pointers = (t.data_ptr() for t in (counts, targets.edges, targets.ids, losses))
    spec = kernels.Targets(*pointers, head.scale, head.softcap or 0.0, y.shape[1], wants)
    kernels.call("cross_entropy", y, kernels.rows(y), spec, len(y))
    return losses.sum(), y if wants else None


@natively(_native_losses)
def _losses(y: Tensor, targets: Targets, head: Head, wants: bool) -> tuple[Tensor, Tensor | None]:
    """The summed loss of a chunk's products y (rows, V) with the head's weight, and its gradient in y's dtype.

    The gradient, where it is wanted, is count · softmax less 1 for each target, times the slope from y to the logits.
    The memory of y is used for it.
    """
    logits, slope = _logits(y, head)
    counts = targets.counts.to(logits.dtype)
    rows = torch.arange(len(y), device=y.device).repeat_interleave(targets.counts)
    hit = logits[rows, targets.ids].sum()
    logits.sub_(top := logits.amax(-1, keepdim=True)).exp_()
    mass = logits.sum(-1, keepdim=True)
    loss = torch.dot((mass.log() + top).flatten(), counts) - hit
    if not wants:
        return loss, None
    logits.mul_(counts[:, None] / mass)
    logits.index_put_((rows, targets.ids), logits.new_tensor(-1.0), accumulate=True)
    if slope is not None:
        logits.mul_(slope)
    if head.scale != 1.0:
        logits.mul_(head.scale)
    return loss, logits.to(y.dtype)


def _logits(y: Tensor, head: Head) -> tuple[Tensor, Tensor | None]:
    """Logits of a chunk in at least float32, and the softcap's slope where there is one."""
    logits = y.to(torch.promote_types(y.dtype, torch.float32))
    if head.scale != 1.0:
        logits.mul_(head.scale)
    if head.softcap is None:
        return logits, None
    logits.div_(head.softcap).tanh_()
    slope = 1 - logits.square()
    return logits.mul_(head.softcap), slope
