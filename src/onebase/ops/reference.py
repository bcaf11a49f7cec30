"""The obvious version of each op: the specification, the fallback and the tests' truth."""

from __future__ import annotations

import torch
from torch import Tensor


def visible(lengths: tuple[int, ...], window: int | None, device: torch.device) -> Tensor:
    """Which positions see which: (T, T) bool, T = sum(lengths); a position sees its own segment's past.

    With a window of w it sees itself and the w - 1 positions before it.
    """
    position = torch.arange(sum(lengths), device=device)
    sizes = torch.tensor(lengths, device=device)
    segment = torch.repeat_interleave(torch.arange(len(lengths), device=device), sizes)
    distance = position[:, None] - position[None, :]
    seen = (segment[:, None] == segment[None, :]) & (distance >= 0)
    return seen if window is None else seen & (distance < window)


def attention_reference(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    lengths: tuple[int, ...],
    scale: float,
    window: int | None = None,
    softcap: float | None = None,
) -> Tensor:
    """`attention.segmented_attention` with the whole (T, T) mask and a softmax in at least float32.

    Semantics:
        k, v = key, value, each head repeated H / Hkv times
        scores = scale * query @ k^T
        scores = softcap * tanh(scores / softcap)          if softcap (Gemma 2, arXiv:2408.00118)
        out = softmax(scores where visible, else -inf) @ v
    """
    exact = torch.promote_types(query.dtype, torch.float32)
    groups = query.shape[1] // key.shape[1]
    q, k, v = query.to(exact), *(t.to(exact).repeat_interleave(groups, dim=1) for t in (key, value))
    scores = scale * q @ k.transpose(-1, -2)
    if softcap is not None:
        scores = softcap * torch.tanh(scores / softcap)
    hidden = ~visible(lengths, window, query.device)
    return (scores.masked_fill(hidden, -torch.inf).softmax(dim=-1) @ v).to(query.dtype)
