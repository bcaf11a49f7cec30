"""One forward for many sequences, each with its own adapter: parts of prompts and next tokens, without autograd."""

from __future__ import annotations

import weakref
from collections.abc import Callable, Mapping, Sequence
from itertools import accumulate
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from onebase.adapters.adapter import Adapter
from onebase.adapters.layers import base_modules
from onebase.models.reading import ReadLayer, ReadModel, read_model
from onebase.ops.adapted import Linear
from onebase.ops.decoder import Attention, Groups
from onebase.ops.gates import Halves, gated
from onebase.ops.grouped import Place, Segment, add_updates, fill, new_place, segments
from onebase.ops.grouped import Row as AdapterRow
from onebase.ops.norms import Norm, norm
from onebase.ops.rotary import Rotation, rotate_
from onebase.serve.cache import Cache, Shape, Span, attend, span_mask
from onebase.serve.native import NativeStep, Token
from onebase.serve.weights import Holder, Product, plain_product


class Row(NamedTuple):
    """Tokens of one sequence to compute, from position `start` on; `wants`: the last one's logits are asked for."""

    slot: int
    tokens: Sequence[int]
    start: int
    wants: bool = True


class _Batch(NamedTuple):
    """What all layers share in a step."""

    segments: list[Segment]
    spans: list[Span]
    masks: Mapping[int | None, list[Tensor | None]]  # for each window: of each span
    rotations: Mapping[str | None, Rotation]
    places: Tensor  # (T · key heads,): where a layer's keys and values go in its part of the cache, as rows


class _Layer(NamedTuple):
    read: ReadLayer
    products: Groups[Product]
    sizes: Groups[list[int]]


class Runner:
    """A decoder that `models.reading` knows. Raises Unsupported with the reason where it does not.

    With `hold` (a row of `weights.PRODUCTS`) the native step computes, on layers that are held so; else torch does.
    The base's tensors are read where they are, so a runner is made again after the model was moved or changed.
    """

    def __init__(self, model: nn.Module, slots: int, context: int, hold: Holder | None = None) -> None:
        self._read = read_model(model, ())
        self._layers = [
            _Layer(
                layer,
                Groups(*map(plain_product, layer.frozen.linears)),
                Groups(*map(_sizes, layer.frozen.linears)),
            )
            for layer in self._read.layers
        ]
        head = self._read.head
        self._head = plain_product([Linear(head.weight, head.bias)])
        self._paths = _paths(model, self._read)
        self._linears = frozenset(path for layer in self._paths for group in layer for path in group)
        spec = self._read.layers[0].frozen.attention
        shape = Shape(len(self._layers), slots, spec.kv_heads, context, spec.width)
        dtype = torch.float32 if hold else head.weight.dtype
        self.cache = Cache(shape, dtype, head.weight.device)
        self._rotations = self._read.rotations(torch.arange(context), self.cache.k.flatten()[:1])
        self._native = NativeStep(self._read, self.cache, self._rotations, hold) if hold else None
        self._adapters: list[Adapter | None] = [None] * slots
        self._ranks = [0] * slots  # of the adapters
        self._filled: list[Callable[[], Adapter | None]] = [lambda: None] * slots
        self._factors: list[Groups[Place]] = []
        self._bytes_per_rank = _bytes_per_rank(self._read, slots)

    def problem(self, adapter: Adapter) -> str:
        """Why the runner cannot compute this adapter, in a few words; empty where it can."""
        odd = [p for p, low in adapter.lowrank.items() if p not in self._linears or low.kind != "linear"]
        shaped = [
            path for path, low in adapter.lowrank.items() if low.magnitude is not None or low.bias is not None
        ]
        reasons = {
            f"it trains {', '.join(adapter.full)} in full": adapter.full,
            f"it has token rows of {', '.join(adapter.tokens)}": adapter.tokens,
            f"it changes {', '.join(odd[:3])}": odd,
            f"it has a magnitude or a bias at {', '.join(shaped[:3])}": shaped,
        }
        return next((reason for reason, found in reasons.items() if found), "")

    def put(self, slot: int, adapter: Adapter | None) -> None:
        """Let a slot's sequence run with this adapter, None for the plain base. Its factors are copied there."""
        self._adapters[slot], self._ranks[slot] = None, 0
        if adapter is None:
            return
        rank = self._rank_with(adapter)
        self._adapters[slot], self._ranks[slot] = adapter, _rank(adapter)
        refill = [slot]
        if rank != self._rank:
            self._factors = []  # freed before the new ones are made
            self._factors = [self._new_places(layer, rank) for layer in self._layers]
            self._filled = [lambda: None] * len(self._adapters)
            if self._native:
                self._native.use(self._factors)
            refill = [number for number, one in enumerate(self._adapters) if one is not None]
        for number in refill:
            self._fill(number)

    @property
    def _rank(self) -> int:
        """What the slots' factors have room for."""
        return self._factors[0].qkv.rank if self._factors else 0

    def _rank_with(self, adapter: Adapter) -> int:
        """What they have room for once this adapter is among them: more where it must, less where that halves it."""
        needed = max(_rank(adapter), *self._ranks)
        return self._rank if needed <= self._rank <= 2 * needed else needed

    @property
    def factor_bytes(self) -> int:
        """Of the slots' factors."""
        return self._rank * self._bytes_per_rank

    def factor_bytes_with(self, adapter: Adapter) -> int:
        """Of the slots' factors once this adapter is among them."""
        return self._rank_with(adapter) * self._bytes_per_rank

    def _new_places(self, layer: _Layer, rank: int) -> Groups[Place]:
        slots, device = self.cache.shape.slots, self.cache.k.device
        return Groups(
            *(
                new_place(
                    slots, rank, group[0].weight.shape[1], [one.weight.shape[0] for one in group], device
                )
                for group in layer.read.frozen.linears
            )
        )

    def _fill(self, slot: int) -> None:
        adapter = self._adapters[slot]
        assert adapter is not None
        if self._filled[slot]() is adapter:  # the slot's last request had the same
            return
        self._filled[slot] = weakref.ref(adapter)
        lows = [
            [low and low.factors for low in map(adapter.lowrank.get, group)]
            for paths in self._paths
            for group in paths
        ]
        if self._native:
            self._native.fill(slot, [low for group in lows for low in group])
            return
        places = [place for layer in self._factors for place in layer]
        for place, group in zip(places, lows, strict=True):
            fill(place, slot, group)

    @torch.inference_mode()
    def forward(self, rows: Sequence[Row]) -> Tensor:
        """The logits (rows that want them, vocabulary), in at least float32, in the rows' order.

        A row's keys and values are stored; those before its start must be there. No slot comes twice.
        """
        order = sorted(range(len(rows)), key=lambda n: (len(rows[n].tokens) > 1, rows[n].slot))
        ordered = [rows[n] for n in order]
        ends = dict(zip(order, accumulate(len(row.tokens) for row in ordered), strict=True))
        wanted = [ends[n] - 1 for n in range(len(rows)) if rows[n].wants]
        ids = torch.tensor([token for row in ordered for token in row.tokens], device=self.cache.k.device)
        hidden = self._read.embed(ids)
        if self._read.embedding != 1.0:
            hidden = hidden * self._read.embedding
        if self._native:
            logits = self._native.forward(hidden.float(), self._tokens(ordered), wanted)
        else:
            logits = self._by_torch(hidden, self._batch(ordered), wanted)
        for row in rows:
            self.cache.written(row.slot, row.start, row.tokens)
        return self._scaled(logits)

    def _by_torch(self, hidden: Tensor, batch: _Batch, wanted: Sequence[int]) -> Tensor:
        for number in range(len(self._layers)):
            hidden = self._layer(number, hidden, batch)
        return self._head(_norm(hidden[wanted], self._read.norm))

    def _tokens(self, rows: Sequence[Row]) -> list[Token]:
        """Where the rows' tokens stand. An adapter that is in several slots is read from the first one."""
        held: dict[int, int] = {}
        for slot, adapter in enumerate(self._adapters):
            if adapter is not None:
                held.setdefault(id(adapter), slot)
        factors = [held.get(id(self._adapters[row.slot]), -1) for row in rows]
        return [
            Token(row.slot, row.start + n, own)
            for row, own in zip(rows, factors, strict=True)
            for n in range(len(row.tokens))
        ]

    def _scaled(self, logits: Tensor) -> Tensor:
        head = self._read.head
        logits = logits.to(torch.promote_types(logits.dtype, torch.float32))
        if head.scale != 1.0:
            logits = logits * head.scale
        return logits if head.softcap is None else head.softcap * torch.tanh(logits / head.softcap)

    def _batch(self, rows: Sequence[Row]) -> _Batch:
        shape, device = self.cache.shape, self.cache.k.device
        positions = torch.cat([torch.arange(row.start, row.start + len(row.tokens)) for row in rows]).to(
            device
        )
        slots = torch.tensor([row.slot for row in rows for _ in row.tokens], device=device)
        heads = torch.arange(shape.heads, device=device)
        places = (slots[:, None] * shape.heads + heads) * shape.context + positions[:, None]
        spans = _spans(rows)
        parts = [(span, positions[span.first : span.last]) for span in spans]
        windows = {layer.read.window for layer in self._layers}
        return _Batch(
            segments([AdapterRow(len(row.tokens), row.slot, self._adapters[row.slot]) for row in rows]),
            spans,
            {window: [span_mask(span, own, window) for span, own in parts] for window in windows},
            {
                kind: table._replace(cos=table.cos[positions], sin=table.sin[positions])
                for kind, table in self._rotations.items()
            },
            places.flatten(),
        )

    def _project(self, number: int, group: int, x: Tensor, batch: _Batch) -> Tensor:
        layer = self._layers[number]
        y = layer.products[group](x)
        if batch.segments:
            add_updates(x, y.split(layer.sizes[group], dim=1), self._factors[number][group], batch.segments)
        return y

    def _layer(self, number: int, x: Tensor, batch: _Batch) -> Tensor:
        """`ops.decoder.Layer`'s semantics, with the keys and values of earlier tokens in the cache."""
        layer = self._layers[number].read.frozen
        norms = layer.norms
        n = _norm(x, norms.before_attention)
        attended = self._attention(number, self._project(number, 0, n, batch), batch)
        a = _norm(self._project(number, 1, attended, batch), norms.after_attention)
        mid = torch.add(x, a, alpha=layer.residual)
        if not layer.parallel:
            n = _norm(mid, norms.before_mlp)
        z = gated(Halves(*self._project(number, 2, n, batch).chunk(2, dim=1)), layer.activation)
        m = _norm(self._project(number, 3, z, batch), norms.after_mlp)
        return torch.add(mid, m, alpha=layer.residual)

    def _attention(self, number: int, qkv: Tensor, batch: _Batch) -> Tensor:
        """The heads' outputs side by side (T, columns); the keys and values go into the cache."""
        read = self._layers[number].read
        spec = read.frozen.attention
        q, k, v = qkv.split(spec.sizes, dim=1)
        rotation = batch.rotations[read.rotary_type] if read.rotates else None
        q, k = (_heads(part, spec, own, rotation) for part, own in ((q, spec.q_norm), (k, spec.k_norm)))
        sides = (self.cache.k[number], self.cache.v[number])
        for side, new in zip(sides, (k, v), strict=True):
            side.view(-1, spec.width).index_copy_(0, batch.places, new.reshape(-1, spec.width))
        q = q.unflatten(1, (spec.kv_heads, -1))
        masks = batch.masks[read.window]
        parts = [
            attend(q[span.first : span.last], sides, span, mask, spec.scoring)
            for span, mask in zip(batch.spans, masks, strict=True)
        ]
        return (parts[0] if len(parts) == 1 else torch.cat(parts)).flatten(1)


def _sizes(group: Sequence[Linear]) -> list[int]:
    return [layer.weight.shape[0] for layer in group]


def _bytes_per_rank(read: ReadModel, slots: int) -> int:
    """Of the slots' factors."""
    linears = [one for layer in read.layers for group in layer.frozen.linears for one in group]
    return slots * sum(sum(one.weight.shape) for one in linears) * torch.float32.itemsize


def _rank(adapter: Adapter) -> int:
    return max(low.rank for low in adapter.lowrank.values())


def _paths(model: nn.Module, read: ReadModel) -> list[Groups[list[str]]]:
    """The base's name of each linear layer, for each layer and group."""
    named = {m.weight.data_ptr(): path for path, m in base_modules(model) if isinstance(m, nn.Linear)}
    return [
        Groups(*([named[one.weight.data_ptr()] for one in group] for group in layer.frozen.linears))
        for layer in read.layers
    ]


def _spans(rows: Sequence[Row]) -> list[Span]:
    """The rows' spans: single tokens in neighbouring slots together, every chunk alone."""
    found: list[Span] = []
    start = 0
    for row in rows:
        stop, length = start + len(row.tokens), row.start + len(row.tokens)
        last = found[-1] if found else None
        chunk = len(row.tokens) > 1
        if last and not chunk and not last.chunk and row.slot == last.slot + last.last - last.first:
            found[-1] = last._replace(last=stop, length=max(last.length, length))
        else:
            found.append(Span(start, stop, row.slot, length, chunk))
        start = stop
    return found


def _heads(x: Tensor, spec: Attention, own: Norm | None, rotation: Rotation | None) -> Tensor:
    """(T, columns) as (T, heads, width): normed over each head or over all together, and turned."""
    if own is not None and not spec.per_head:
        x = _norm(x, own)
    x = x.unflatten(1, (-1, spec.width))
    if own is not None and spec.per_head:
        x = _norm(x, own)
    return x if rotation is None else rotate_(x.clone(), rotation)


def _norm(x: Tensor, spec: Norm | None) -> Tensor:
    """`ops.norms.norm`, through torch's fused kernel where that computes the same."""
    if spec is None:
        return x
    if spec.centred or spec.weight.ndim > 1 or x.dtype != spec.weight.dtype:
        return norm(x, spec)
    return F.rms_norm(x, spec.weight.shape, spec.weight, spec.eps)
