"""Frozen linear layers ready for inference: the ways to hold and to compute them, each a row of one table."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import NamedTuple, Protocol

import torch
import torch.nn.functional as F
from torch import Tensor

from onebase.models.reading import Unsupported
from onebase.ops.adapted import Linear

GROUP = 32  # neighbouring weights of a row that share a scale
FLOAT32, BFLOAT16, INT8, INT4 = range(4)  # step.c's formats
_FIRST = 64  # rows that are tried before the others
_LOSSLESS = 2e-6  # largest error, as a part of a group's largest weight, that float32's rounding explains


class Held(NamedTuple):
    """A layer as the native step reads it: the weight in one of its formats, the scales of each group of a row."""

    format: int
    rows: int
    columns: int
    weight: Tensor
    scales: Tensor | None = None
    least: Tensor | None = None
    bias: Tensor | None = None
    copied: int = 0  # bytes beside the base's own

    def widened(self) -> Tensor:
        """The weight that is computed with, (rows, columns) in float32."""
        if self.scales is None:
            return self.weight.float()
        if self.least is None:
            whole = self.weight.view(self.rows, -1, GROUP).float()
            return (whole * self.scales[..., None]).flatten(1)
        pair = self.weight.view(self.rows, -1, GROUP // 2)
        whole = torch.cat([pair & 15, pair >> 4], dim=-1).float()
        return torch.addcmul(self.least[..., None], whole, self.scales[..., None]).flatten(1)


class Holder(Protocol):
    """Holds a layer; `head`: it makes the logits."""

    def __call__(self, layer: Linear, head: bool) -> Held: ...


def as_is(layer: Linear, head: bool = False) -> Held:
    """The base's own tensors where they are."""
    weight = layer.weight
    formats = {torch.float32: FLOAT32, torch.bfloat16: BFLOAT16}
    if weight.dtype not in formats or not weight.is_contiguous():
        raise Unsupported(f"the native step does not read weights in {weight.dtype}")
    bias = None if layer.bias is None else layer.bias.float()
    rows, columns = weight.shape
    return Held(formats[weight.dtype], rows, columns, weight, bias=bias)


def int8(layer: Linear, head: bool = False) -> Held:
    """Eight bits a weight: in each group q in -127..127, w = step · q. As GGUF's Q8_0, with a float32 step."""
    groups = _groups(layer.weight)
    scales = groups.abs().amax(dim=-1) / 127
    steps = scales.where(scales > 0, 1.0)[..., None]
    return _held(INT8, layer, (groups / steps).round_().to(torch.int8), scales)


def int4(layer: Linear, head: bool = False) -> Held:
    """Four bits a weight: in each group q in 0..15, w = least + step · q. As GGUF's Q4_1. The head has eight."""
    if head:
        return int8(layer)
    groups = _groups(layer.weight)
    least, most = groups.aminmax(dim=-1)
    scales = (most - least) / 15
    steps = scales.where(scales > 0, 1.0)[..., None]
    whole = ((groups - least[..., None]) / steps).round_().to(torch.uint8)
    low, high = whole.chunk(2, dim=-1)
    return _held(INT4, layer, low | (high << 4), scales, least)


def packed(layer: Linear, head: bool = False) -> Held:
    """As narrow as loses nothing: a base that was stored in few bits goes back to them, others stay as they are."""
    first = Linear(layer.weight[:_FIRST])
    for pack in (int4, int8) if layer.weight.shape[1] % GROUP == 0 else ():
        if _loses_nothing(pack(first), first) and _loses_nothing(held := pack(layer), layer):
            return held
    return as_is(layer)


def _loses_nothing(held: Held, layer: Linear) -> bool:
    error, size = (_groups(one).abs().amax(dim=-1) for one in (held.widened() - layer.weight, layer.weight))
    return layer.weight.dtype == torch.float32 and bool((error <= _LOSSLESS * size).all())


def remembered(hold: Holder) -> Holder:
    """The holder, with what it held once: packing a model takes seconds."""
    found: dict[tuple[int, bool], Held] = {}

    def held(layer: Linear, head: bool) -> Held:
        key = (layer.weight.data_ptr(), head)
        if key not in found:
            found[key] = hold(layer, head)
        return found[key]

    return held


def _groups(weight: Tensor) -> Tensor:
    if weight.shape[1] % GROUP:
        raise Unsupported(f"a layer has {weight.shape[1]} inputs, which {GROUP} does not divide")
    return weight.float().unflatten(1, (-1, GROUP))


def _held(kind: int, layer: Linear, whole: Tensor, scales: Tensor, least: Tensor | None = None) -> Held:
    bias = None if layer.bias is None else layer.bias.float()
    size = sum(one.nbytes for one in (whole, scales, least) if one is not None)
    rows, columns = layer.weight.shape
    return Held(kind, rows, columns, whole.contiguous(), scales, least, bias, size)


# Ways to compute, by name: how the native step holds the layers; None: torch's own products. docs/serving.md has
# the speed of each.
PRODUCTS: dict[str, Holder | None] = {
    "packed": packed,
    "native": as_is,
    "plain": None,
    "int8": int8,
    "int4": int4,
}
AUTOMATIC = ("packed", "plain")  # the fastest that lose nothing, in the order in which they are tried

Product = Callable[[Tensor], Tensor]
"""x (T, in) -> the layers' outputs side by side (T, sum of out)."""


def plain_product(layers: Sequence[Linear]) -> Product:
    """torch's own products, on the base's weights where they are."""
    if len(layers) == 1:
        weight, bias = layers[0]
        return lambda x: F.linear(x, weight, bias)
    sizes = [layer.weight.shape[0] for layer in layers]

    def product(x: Tensor) -> Tensor:
        y = x.new_empty(x.shape[0], sum(sizes))
        for (weight, bias), part in zip(layers, y.split(sizes, dim=1), strict=True):
            if bias is None:
                torch.mm(x, weight.T, out=part)
            else:
                torch.addmm(bias, x, weight.T, out=part)
        return y

    return product
