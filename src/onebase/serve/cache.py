"""Keys and values in slots: one sequence in each, and prefixes that a later sequence can use again."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from onebase.ops.prefix import Scoring


class Shape(NamedTuple):
    """The sizes of a cache: layers, slots, key heads, positions of a slot, channels of a head."""

    layers: int
    slots: int
    heads: int
    context: int
    width: int

    def bytes(self, dtype: torch.dtype) -> int:
        """Of all keys and values."""
        return 2 * self.layers * self.slots * self.heads * self.context * self.width * dtype.itemsize


class Cache:
    """Keys and values (layers, slots, heads, context, width), and whose tokens they are.

    `key` names what made a slot's contents: the adapter and its version. Under another key the same tokens have other
    keys and values.
    """

    def __init__(self, shape: Shape, dtype: torch.dtype, device: torch.device) -> None:
        self.shape = shape
        sizes = (shape.layers, shape.slots, shape.heads, shape.context, shape.width)
        # Zeros, not what the memory holds: a masked NaN would still be a NaN after the softmax's product. And written,
        # which `torch.zeros` leaves to the first use of each page: memory that is not there shows now, not under load.
        self.k, self.v = (torch.empty(sizes, dtype=dtype, device=device).zero_() for _ in range(2))
        self._tokens: list[list[int]] = [[] for _ in range(shape.slots)]
        self._keys: list[object] = [None] * shape.slots

    def take(self, free: Sequence[int], key: object, prompt: Sequence[int]) -> tuple[int, int]:
        """(a free slot for this prompt, how many of its first tokens are in it already; at least one is not)."""
        shared = [
            _common(self._tokens[slot], prompt) if self._keys[slot] == key else 0
            for slot in range(self.shape.slots)
        ]
        best = max(range(self.shape.slots), key=lambda slot: (shared[slot], slot in free, -slot))
        # The slot that holds the prefix, else the one whose contents are the least loss.
        slot = (
            best
            if best in free and shared[best]
            else min(free, key=lambda one: (len(self._tokens[one]), one))
        )
        count = min(shared[best], len(prompt) - 1)
        if slot != best and count:
            for side in (self.k, self.v):
                side[:, slot, :, :count] = side[:, best, :, :count]
        self._keys[slot], self._tokens[slot] = key, list(prompt[:count])
        return slot, count

    def written(self, slot: int, start: int, tokens: Sequence[int]) -> None:
        """The keys and values of these tokens are in the slot from position `start` on."""
        assert len(self._tokens[slot]) == start
        self._tokens[slot] += tokens

    def forget(self, slot: int) -> None:
        """The slot's contents are not to be used again."""
        self._tokens[slot], self._keys[slot] = [], None


def _common(one: Sequence[int], other: Sequence[int]) -> int:
    """The number of tokens that two sequences begin with alike."""
    return next(
        (n for n, (a, b) in enumerate(zip(one, other, strict=False)) if a != b), min(len(one), len(other))
    )


class Span(NamedTuple):
    """Rows of a batch [first, last) that attend together.

    Each is the next token of a sequence, in neighbouring slots from `slot` on; or all are tokens of one slot
    (`chunk`), from position `length` - (last - first) on. `length`: the most tokens that one sees.
    """

    first: int
    last: int
    slot: int
    length: int
    chunk: bool


def span_mask(span: Span, positions: Tensor, window: int | None) -> Tensor | None:
    """What the span's tokens see, added to their scores: (rows, 1, 1, length), or (rows, length) in a chunk.

    `positions` (rows,) are the tokens' own. None where each sees all of `length`.
    """
    ends = positions[:, None]
    at = torch.arange(span.length, device=positions.device)
    seen = at <= ends
    if window is not None:
        seen &= at > ends - window
    if bool(seen.all()):
        return None
    mask = torch.zeros(seen.shape, device=positions.device).masked_fill_(~seen, -torch.inf)
    return mask if span.chunk else mask[:, None, None]


def attend(
    q: Tensor, sides: tuple[Tensor, Tensor], span: Span, mask: Tensor | None, scoring: Scoring
) -> Tensor:
    """The attention of a span's queries q (rows, key heads, g, width) over a layer's keys and values: in q's shape.

    The g query heads of a key head are rows of one product, so keys and values are not repeated.
    """
    if span.chunk:
        k, v = (side[span.slot, :, : span.length] for side in sides)
        heads, group = q.shape[1:3]
        mask = mask if mask is None else mask.repeat(group, 1)
        by_head = q.permute(1, 2, 0, 3).flatten(1, 2)  # (heads, g · rows, width)
        out = _scored(by_head[None], k[None], v[None], mask, scoring)[0]
        return out.view(heads, group, -1, out.shape[-1]).permute(2, 0, 1, 3)
    k, v = (side[span.slot : span.slot + q.shape[0], :, : span.length] for side in sides)
    return _scored(q, k, v, mask, scoring)


def _scored(q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None, scoring: Scoring) -> Tensor:
    bias = None if mask is None else mask.to(q.dtype)
    if scoring.softcap is None:
        return F.scaled_dot_product_attention(q, k, v, attn_mask=bias, scale=scoring.scale)
    wide = torch.promote_types(q.dtype, torch.float32)  # no fused kernel caps its scores
    scores = (q.to(wide) @ k.to(wide).mT).mul_(scoring.scale / scoring.softcap).tanh_().mul_(scoring.softcap)
    if bias is not None:
        scores += bias
    return (scores.softmax(dim=-1) @ v.to(wide)).to(q.dtype)
