"""A decoder layer with frozen weights and low-rank updates, as one autograd function with a backward written by hand.

Forward keeps the least that the backward cannot cheaply make again; the backward gives the gradients of the hidden
states and of the updates' factors, never of a frozen weight. Where nothing below wants a gradient, it stops early.
The tokens may belong to several adapters, each with its own updates.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, Generic, NamedTuple, TypeVar

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from onebase.ops.adapted import Dropout, Linear, Share, project, project_backward
from onebase.ops.gates import Halves, gated, gated_backward
from onebase.ops.lowrank import Factors
from onebase.ops.norms import Norm, norm, norm_backward
from onebase.ops.prefix import Forest, Heads, Scoring, prefix_attention, prefix_attention_backward
from onebase.ops.rotary import Rotation, rotate_

S = TypeVar("S")
T = TypeVar("T")


class Attention(NamedTuple):
    """Shapes and habits of an attention: `heads` query heads of `width` channels over `kv_heads` key heads."""

    heads: int
    kv_heads: int
    width: int
    scoring: Scoring
    q_norm: Norm | None = None  # before the rotation
    k_norm: Norm | None = None
    per_head: bool = True  # these norms are over a head's channels, else over all heads' together

    @property
    def sizes(self) -> list[int]:
        """The columns of q, k and v in their projection's output."""
        return [self.heads * self.width, self.kv_heads * self.width, self.kv_heads * self.width]


class Groups(NamedTuple, Generic[T]):
    """Something for each group of linear layers with one input; q, k, v may be one layer, and gate, up too."""

    qkv: T
    out: T
    gate_up: T
    down: T


class Norms(NamedTuple):
    """Where a layer normalises: before and after its attention and its MLP."""

    before_attention: Norm | None = None
    after_attention: Norm | None = None
    before_mlp: Norm | None = None
    after_mlp: Norm | None = None


class Layer(NamedTuple):
    """A decoder layer's frozen part. With `parallel` attention and MLP both read the first norm's output.

    Semantics:
        mid = x + residual · after_attention(attention(before_attention(x)))
        y = mid + residual · after_mlp(mlp(before_mlp(mid)))
        y = x + residual · (attention(n) + mlp(n)), n = before_attention(x)        if parallel
    """

    linears: Groups[tuple[Linear, ...]]
    attention: Attention
    norms: Norms
    activation: str
    residual: float = 1.0
    parallel: bool = False

    @property
    def inner(self) -> list[int]:
        """The columns of gate and up in their projection's output."""
        return [self.linears.down[0].weight.shape[1]] * 2


Updates = Groups[tuple[Factors | None, ...]]


class Part(NamedTuple):
    """Tokens [start, stop) of a batch, and the adapter that they run with."""

    start: int
    stop: int
    updates: Updates
    dropout: Dropout | None = None


class Call(NamedTuple):
    """What a pass over a batch gives a layer beside the hidden states."""

    layer: Layer
    forest: Forest
    rotation: Rotation | None
    checkpoint: bool = False  # keep the input alone, and compute the rest again in the backward


class _State(NamedTuple):
    """What the backward reads. None: not needed by this layer."""

    x: Tensor
    raw_q: Tensor | None  # q and k before their norms
    raw_k: Tensor | None
    q: Tensor
    k: Tensor
    v: Tensor
    attended: Tensor
    a: Tensor | None  # the attention's output before its norm
    mid: Tensor | None
    gate: Tensor
    up: Tensor
    m: Tensor | None  # the MLP's output before its norm
    h: Groups[list[Tensor]]

    def flat(self) -> list[Tensor | None]:
        return [*self[:-1], *(h for group in self.h for h in group)]

    @classmethod
    def of(cls, flat: Sequence[Any]) -> _State:
        first = len(cls._fields) - 1
        each = (len(flat) - first) // 4
        starts = (first + number * each for number in range(4))
        return cls(*flat[:first], h=Groups(*(list(flat[start : start + each]) for start in starts)))


_Shares = Groups[tuple[Share[T], ...]]  # of each group of linear layers, in the order of the parts


def decoder_layer(x: Tensor, call: Call, parts: Sequence[Part]) -> Tensor:
    """The layer's output (T, D) for the hidden states x (T, D). Tokens in no part run without an adapter."""
    shares = _shares(parts)
    factors = [tensor for low in _present(shares) for tensor in (low.A, low.B)]
    return _DecoderLayer.apply(x, call, _mapped(shares, _scale), *factors)  # pyright: ignore[reportReturnType]


class _DecoderLayer(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, call: Call, scales: _Shares[float], *factors: Tensor) -> Tensor:
        y, state = _forward(x, call, _with_factors(scales, factors))
        kept = [x] if call.checkpoint else state.flat()
        ctx.save_for_backward(*factors, *kept)
        ctx.call, ctx.scales, ctx.count = call, scales, len(factors)
        return y

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Any, ...]:  # pyright: ignore[reportIncompatibleMethodOverride]
        saved, call = ctx.saved_tensors, ctx.call
        shares = _with_factors(ctx.scales, saved[: ctx.count])
        kept = saved[ctx.count :]
        state = _forward(kept[0], call, shares)[1] if call.checkpoint else _State.of(kept)
        dx, factors = _backward(gradients[0], state, call, shares, ctx.needs_input_grad[0])
        return dx, None, None, *factors


def _shares(parts: Sequence[Part]) -> _Shares[Factors]:
    """The parts group by group, each group with masks of its own: it has at most three layers."""
    return Groups(
        *(
            tuple(
                Share(
                    part.start,
                    part.stop,
                    part.updates[number],
                    part.dropout and part.dropout._replace(seed=part.dropout.seed + 3 * number),
                )
                for part in parts
            )
            for number in range(4)
        )
    )


def _present(shares: _Shares[T]) -> list[T]:
    return [low for group in shares for share in group for low in share.present]


def _mapped(shares: _Shares[S], change: Callable[[S], T]) -> _Shares[T]:
    """The shares with every update changed, in the order of `_present`."""
    return Groups(
        *(
            tuple(
                Share(
                    share.start,
                    share.stop,
                    [None if low is None else change(low) for low in share.updates],
                    share.dropout,
                )
                for share in group
            )
            for group in shares
        )
    )


def _scale(low: Factors) -> float:
    return low.scale


def _with_factors(scales: _Shares[float], factors: Sequence[Tensor]) -> _Shares[Factors]:
    left = iter(factors)
    return _mapped(scales, lambda scale: Factors(next(left), next(left), scale))


def _adapted(group: Sequence[Share[Factors]]) -> bool:
    return any(share.present for share in group)


def _forward(x: Tensor, call: Call, shares: _Shares[Factors]) -> tuple[Tensor, _State]:
    layer, norms = call.layer, call.layer.norms
    n = _normed(x, norms.before_attention)
    y, h_qkv = project(n, layer.linears.qkv, shares.qkv)
    raw = _parts(y, layer.attention.sizes)
    heads = _heads(raw, layer.attention, call.rotation)
    attended = prefix_attention(heads, call.forest, layer.attention.scoring).flatten(1)
    (a,), h_out = project(attended, layer.linears.out, shares.out)
    mid = _added(x, _normed(a, norms.after_attention), layer.residual)
    if not layer.parallel:
        n = _normed(mid, norms.before_mlp)
    y, h_gate_up = project(n, layer.linears.gate_up, shares.gate_up)
    gate_up = Halves(*_parts(y, layer.inner))
    z = gated(gate_up, layer.activation)
    (m,), h_down = project(z, layer.linears.down, shares.down)
    y = _added(mid, _normed(m, norms.after_mlp), layer.residual)
    state = _State(
        x,
        raw[0] if layer.attention.q_norm else None,
        raw[1] if layer.attention.k_norm else None,
        *heads,
        attended,
        a if norms.after_attention else None,
        None if layer.parallel else mid,
        *gate_up,
        m if norms.after_mlp else None,
        Groups(h_qkv, h_out, h_gate_up, h_down),
    )
    return y, state


def _backward(
    dy: Tensor, state: _State, call: Call, shares: _Shares[Factors], wants_x: bool
) -> tuple[Tensor | None, list[Tensor]]:
    """(the gradient of x or None, those of the factors in the order of the groups)."""
    layer, norms = call.layer, call.layer.norms
    wants_qkv = wants_x or _adapted(shares.qkv)
    wants_attention = wants_qkv or _adapted(shares.out)
    wants_mid = wants_x if layer.parallel else wants_attention
    wants_gate_up = wants_mid or _adapted(shares.gate_up)
    n = _normed(state.x, norms.before_attention) if layer.parallel or _adapted(shares.qkv) else state.x

    dm = _before_norm(_times(dy, layer.residual), state.m, norms.after_mlp)
    gate_up = Halves(state.gate, state.up)
    z = gated(gate_up, layer.activation)
    dz, d_down = project_backward([dm], (z, state.h.down), layer.linears.down, shares.down, wants_gate_up)
    d_n, d_gate_up = None, list[Tensor]()
    if dz is not None:
        d_outputs = _blank(dz, layer.linears.gate_up)
        gated_backward(dz, gate_up, layer.activation, Halves(*_parts(d_outputs, layer.inner)))
        d_n, d_gate_up = project_backward(
            d_outputs,
            (n if state.mid is None else _normed(state.mid, norms.before_mlp), state.h.gate_up),
            layer.linears.gate_up,
            shares.gate_up,
            wants_mid,
        )
    if not wants_attention:
        return None, [*d_gate_up, *d_down]
    d_mid = dy
    if state.mid is not None and d_n is not None:
        d_mid = _before_norm(d_n, state.mid, norms.before_mlp, dy)
    d_x, d_qkv, d_out = _attention_backward(d_mid, state, call, shares, (n, wants_qkv, wants_x))
    factors = [*d_qkv, *d_out, *d_gate_up, *d_down]
    if d_x is None:
        return None, factors
    if layer.parallel and d_n is not None:
        d_x += d_n
    return _before_norm(d_x, state.x, norms.before_attention, d_mid), factors


def _attention_backward(
    d_mid: Tensor, state: _State, call: Call, shares: _Shares[Factors], wanted: tuple[Tensor, bool, bool]
) -> tuple[Tensor | None, list[Tensor], list[Tensor]]:
    """The gradients of the attention's normed input and of the factors of qkv and out.

    `wanted`: that input, whether q, k, v want a gradient, and whether the input does.
    """
    (n, wants_qkv, wants_x), layer = wanted, call.layer
    da = _before_norm(_times(d_mid, layer.residual), state.a, layer.norms.after_attention)
    read = (state.attended, state.h.out)
    d_attended, d_out = project_backward([da], read, layer.linears.out, shares.out, wants_qkv)
    if d_attended is None:
        return None, [], d_out
    heads, spec = Heads(state.q, state.k, state.v), layer.attention
    d_attended, attended = _split(d_attended, spec), _split(state.attended, spec)
    d_outputs = _blank(d_attended, layer.linears.qkv)
    d_raw = _parts(d_outputs, spec.sizes)
    d_heads = _as_heads(d_raw, spec)
    prefix_attention_backward(d_attended, attended, heads, call.forest, spec.scoring, d_heads)
    _heads_backward(d_heads, state, spec, call.rotation, d_raw)
    d_x, d_qkv = project_backward(d_outputs, (n, state.h.qkv), layer.linears.qkv, shares.qkv, wants_x)
    return d_x, d_qkv, d_out


def _heads(raw: Sequence[Tensor], spec: Attention, rotation: Rotation | None) -> Heads:
    """q (T, n, g, d), k and v (T, n, d) from their projections (T, columns): normed and, in their memory, turned."""
    q, k, v = raw
    heads = _as_heads((_head_normed(q, spec.q_norm, spec), _head_normed(k, spec.k_norm, spec), v), spec)
    if rotation is not None:
        rotate_(heads.q, rotation)
        rotate_(heads.k, rotation)
    return heads


def _heads_backward(
    d_heads: Heads, state: _State, spec: Attention, rotation: Rotation | None, d_raw: Sequence[Tensor]
) -> None:
    """Make the gradients of the heads, which are views of `d_raw`, those of the projections (T, columns)."""
    if rotation is not None:
        back = rotation.inverse
        rotate_(d_heads.q, back)
        rotate_(d_heads.k, back)
    norms = ((state.raw_q, spec.q_norm), (state.raw_k, spec.k_norm))
    for part, (before, spec_norm) in zip(d_raw, norms, strict=False):
        if before is not None and spec_norm is not None:
            gradient = norm_backward(_for_norm(part, spec), _for_norm(before, spec), spec_norm)
            part.copy_(gradient.view(part.shape))


def _blank(like: Tensor, layers: Sequence[Linear]) -> list[Tensor]:
    """Room for the gradient (T, out) of each layer's output."""
    return [like.new_empty(len(like), layer.weight.shape[0]) for layer in layers]


def _parts(outputs: Sequence[Tensor], sizes: Sequence[int]) -> Sequence[Tensor]:
    """The layers' outputs, one layer's cut by its columns where it is several in one."""
    return outputs if len(outputs) == len(sizes) else outputs[0].split(sizes, dim=1)


def _split(x: Tensor, spec: Attention) -> Tensor:
    """(T, n · g · d) as (T, n, g, d), a view."""
    return x.unflatten(1, (spec.kv_heads, -1, spec.width))


def _as_heads(raw: Sequence[Tensor], spec: Attention) -> Heads:
    """q, k and v (T, columns) head by head, as views."""
    q, k, v = (_split(part, spec) for part in raw)
    return Heads(q, k[:, :, 0], v[:, :, 0])


def _for_norm(x: Tensor, spec: Attention) -> Tensor:
    return x.unflatten(1, (-1, spec.width)) if spec.per_head else x


def _head_normed(x: Tensor, spec_norm: Norm | None, spec: Attention) -> Tensor:
    return x if spec_norm is None else norm(_for_norm(x, spec), spec_norm).view(x.shape)


def _normed(x: Tensor, spec: Norm | None) -> Tensor:
    return x if spec is None else norm(x, spec)


def _before_norm(dy: Tensor, x: Tensor | None, spec: Norm | None, more: Tensor | None = None) -> Tensor:
    """The gradient of a norm's input x plus `more`; without a norm it is dy's."""
    if spec is None or x is None:
        return dy if more is None else dy.add_(more)
    return norm_backward(dy, x, spec, more)


def _times(x: Tensor, factor: float) -> Tensor:
    return x if factor == 1.0 else x * factor


def _added(x: Tensor, more: Tensor, factor: float) -> Tensor:
    """x + factor · more, in the memory of `more`."""
    return (more if factor == 1.0 else more.mul_(factor)).add_(x)
