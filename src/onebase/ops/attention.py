"""Causal attention over rows put end to end in one sequence: no padding, and no row sees another."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn.functional import scaled_dot_product_attention

from onebase.ops.reference import attention_reference, visible


def segmented_attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    lengths: tuple[int, ...],
    scale: float,
    window: int | None = None,
    softcap: float | None = None,
) -> Tensor:
    """Causal attention inside each segment only; the cost is the sum of the squared lengths, not T squared.

    query (1, H, T, D), key (1, Hkv, T, D), value (1, Hkv, T, Dv) with H a multiple of Hkv; `lengths` are the
    segments' tokens and sum to T. Gives (1, H, T, Dv) in the query's dtype. A position sees itself and, with a
    window of w, the w - 1 positions before it. Raises ValueError where shapes and lengths do not fit.

    Semantics, for each segment s of T:
        k, v = key[:, :, s], value[:, :, s], each head repeated H / Hkv times
        scores = scale * query[:, :, s] @ k^T
        scores = softcap * tanh(scores / softcap)          if softcap
        scores[i, j] = -inf                                where j > i, or j <= i - window
        out[:, :, s] = softmax(scores) @ v
    """
    _check(query, key, value, lengths)
    # One call per segment: batching those of equal length was measured and is no faster, for it copies them.
    segments = zip(*(tensor.split(lengths, dim=2) for tensor in (query, key, value)), strict=True)
    if softcap is not None:  # no fused kernel caps its scores
        outputs = [
            attention_reference(q, k, v, (q.shape[2],), scale, window, softcap) for q, k, v in segments
        ]
    else:
        outputs = [_causal(q, k, v, scale, window) for q, k, v in segments]
    return torch.cat(outputs, dim=2)


def _causal(query: Tensor, key: Tensor, value: Tensor, scale: float, window: int | None) -> Tensor:
    """Attention inside one segment of L tokens: query (1, H, L, D) -> (1, H, L, Dv)."""
    length = query.shape[2]
    # A mask keeps the fastest kernels away, so it is built only where the window cuts something off.
    mask = visible((length,), window, query.device) if window is not None and window < length else None
    return scaled_dot_product_attention(
        query,
        key,
        value,
        attn_mask=mask,
        is_causal=mask is None,
        scale=scale,
        enable_gqa=query.shape[1] != key.shape[1],
    )


def _check(query: Tensor, key: Tensor, value: Tensor, lengths: tuple[int, ...]) -> None:
    rows, heads, tokens, width = query.shape
    fits = (
        rows == key.shape[0] == value.shape[0] == 1
        and tokens == key.shape[2] == value.shape[2] == sum(lengths)
        and width == key.shape[3]
        and key.shape[1] == value.shape[1]
        and heads % key.shape[1] == 0
        and min(lengths, default=0) > 0
    )
    if not fits:
        shapes = ", ".join(str(tuple(tensor.shape)) for tensor in (query, key, value))
        raise ValueError(f"segmented_attention: shapes {shapes} do not fit segments of {lengths} tokens")
