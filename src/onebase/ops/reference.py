"""The obvious version of each op: the specification, the fallback and the tests' truth."""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

from onebase.ops.adapted import Linear
from onebase.ops.cross_entropy import Head
from onebase.ops.decoder import Attention, Layer, Updates
from onebase.ops.forest import Node
from onebase.ops.lowrank import Factors, lowrank
from onebase.ops.norms import Norm
from onebase.ops.prefix import Scoring
from onebase.ops.rotary import Rotation

GATES = {
    "silu": lambda x: x / (1 + torch.exp(-x)),
    "gelu": lambda x: x * (1 + torch.erf(x / 2**0.5)) / 2,
    "gelu_tanh": lambda x: x * (1 + torch.tanh((2 / torch.pi) ** 0.5 * (x + 0.044715 * x**3))) / 2,
}


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


def norm_reference(x: Tensor, spec: Norm) -> Tensor:
    """`norms.norm`, step by step."""
    wide = x.to(spec.weight.dtype)
    if spec.centred:
        wide = wide - wide.mean(-1, keepdim=True)
    return (spec.weight * wide / torch.sqrt(wide.square().mean(-1, keepdim=True) + spec.eps)).to(x.dtype)


def gated_reference(gate_up: Tensor, activation: str) -> Tensor:
    """`gates.gated`'s z, the activation written out."""
    gate, up = gate_up.chunk(2, dim=-1)
    return GATES[activation](gate) * up


def rotate_reference(x: Tensor, rotation: Rotation | None) -> Tensor:
    """`rotary.rotate`: each pair of channels of x (T, ..., d) times a rotation matrix."""
    if rotation is None:
        return x
    cos, sin, interleaved = rotation
    count = cos.shape[-1]
    result = x.clone()
    for pair in range(count):
        one, other = (2 * pair, 2 * pair + 1) if interleaved else (pair, pair + count)
        shape = (-1, *(1,) * (x.ndim - 2))
        c, s = cos[:, pair].view(shape), sin[:, pair].view(shape)
        result[..., one] = x[..., one] * c - x[..., other] * s
        result[..., other] = x[..., other] * c + x[..., one] * s
    return result


def visible_in_tree(nodes: Sequence[Node], window: int | None) -> Tensor:
    """Which tokens see which: (T, T) bool. Each token is followed up its tree, one token at a time."""
    rows: dict[int, list[int]] = {-1: []}  # the tokens from the root to the end of each node
    seen = torch.zeros((sum(length for _, length, _ in nodes),) * 2, dtype=torch.bool)
    for number, (start, length, parent) in enumerate(nodes):
        rows[number] = rows[parent] + list(range(start, start + length))
        for place in range(len(rows[parent]), len(rows[number])):
            first = 0 if window is None else max(0, place - window + 1)
            seen[rows[number][place], rows[number][first : place + 1]] = True
    return seen


def prefix_attention_reference(q: Tensor, k: Tensor, v: Tensor, seen: Tensor, scoring: Scoring) -> Tensor:
    """`prefix.prefix_attention` with the whole (T, T) mask: q (n, T, g, d), k (n, T, d), v (n, T, dv)."""
    scores = scoring.scale * torch.einsum("nqgd,nkd->nqgk", q, k)
    if scoring.softcap is not None:
        scores = scoring.softcap * torch.tanh(scores / scoring.softcap)
    weights = scores.masked_fill(~seen[:, None], -torch.inf).softmax(dim=-1)
    return torch.einsum("nqgk,nkd->nqgd", weights, v)


def project_reference(x: Tensor, layers: Sequence[Linear], updates: Sequence[Factors | None]) -> Tensor:
    """`adapted.project`'s y for one adapter, without dropout: each layer alone, its update added."""
    plain = [F.linear(x, weight, bias) for weight, bias in layers]
    sums = [
        y if low is None else (y + lowrank(x, low)).to(x.dtype) for y, low in zip(plain, updates, strict=True)
    ]
    return torch.cat(sums, dim=-1)


def cross_entropy_reference(hidden: Tensor, head: Head, rows: Tensor, ids: Tensor) -> Tensor:
    """`cross_entropy.frozen_cross_entropy` with all logits at once."""
    logits = head.scale * F.linear(hidden, head.weight, head.bias)[rows]
    if head.softcap is not None:
        logits = head.softcap * torch.tanh(logits / head.softcap)
    return -logits.log_softmax(-1)[torch.arange(len(ids)), ids].sum()


def decoder_reference(
    x: Tensor, layer: Layer, updates: Updates, rotation: Rotation | None, seen: Tensor
) -> Tensor:
    """`decoder.decoder_layer` with one adapter for all tokens, without dropout, made of the references above."""
    norms, linears, spec = layer.norms, layer.linears, layer.attention

    def normed(tensor: Tensor, norm: Norm | None) -> Tensor:
        return tensor if norm is None else norm_reference(tensor, norm)

    n = normed(x, norms.before_attention)
    q, k, v = project_reference(n, linears.qkv, updates.qkv).split(spec.sizes, dim=1)
    q, k = (
        rotate_reference(_by_head(part, spec, norm), rotation)
        for part, norm in ((q, spec.q_norm), (k, spec.k_norm))
    )
    q = q.unflatten(1, (spec.kv_heads, -1)).transpose(0, 1)
    k, v = k.transpose(0, 1), _by_head(v, spec, None).transpose(0, 1)
    attended = prefix_attention_reference(q, k, v, seen, spec.scoring).transpose(0, 1).flatten(1)
    a = normed(project_reference(attended, linears.out, updates.out), norms.after_attention)
    mid = x + layer.residual * a
    n = n if layer.parallel else normed(mid, norms.before_mlp)
    z = gated_reference(project_reference(n, linears.gate_up, updates.gate_up), layer.activation)
    m = normed(project_reference(z, linears.down, updates.down), norms.after_mlp)
    return mid + layer.residual * m


def _by_head(x: Tensor, spec: Attention, norm: Norm | None) -> Tensor:
    """(T, columns) as (T, heads, d), normed over each head or over all heads together."""
    if norm is not None and not spec.per_head:
        x = norm_reference(x, norm)
    x = x.unflatten(1, (-1, spec.width))
    return norm_reference(x, norm) if norm is not None and spec.per_head else x
