"""The low-rank update: W + s·B·A, and its product with an input. Everything else in onebase calls these."""

from __future__ import annotations

from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

# Shape suffixes: i = in features, o = out features, r = rank, g = blocks, * = any leading sizes.

CONVOLUTIONS = (F.conv1d, F.conv2d, F.conv3d)


class Factors(NamedTuple):
    """s·B·A: A (g·r, i), B (g·o, r), and what s multiplies."""

    A: Tensor
    B: Tensor
    scale: float
    blocks: int = 1


def finite_scale(scale: float, dtype: torch.dtype = torch.float32) -> bool:
    """Whether a scale is a finite number of this dtype."""
    return abs(scale) <= torch.finfo(dtype).max


def update(low: Factors) -> Tensor:
    """s·B·A in full, (g·o, i); each of the g blocks of rows is the product of its own factors."""
    if low.blocks == 1:
        return low.scale * (low.B @ low.A)
    a, b = (t.unflatten(0, (low.blocks, -1)) for t in (low.A, low.B))
    return low.scale * (b @ a).flatten(0, 1)


def effective_weight(
    weight_oi: Tensor, low: Factors, magnitude_o: Tensor | None = None, in_place: bool = False
) -> Tensor:
    """W + s·B·A, computed in float32 (float64 for float64) and cast once to W's dtype.

    `in_place`: W's memory may become the result's (it does where W is contiguous); without autograd.

    With a magnitude m (DoRA) each row is then given the norm m: m · (W + s·B·A) / |W + s·B·A|, where the norm counts
    as a constant for gradients. Source: Hu et al. 2021, "LoRA: Low-Rank Adaptation of Large Language Models",
    equation 3; Liu et al. 2024, "DoRA: Weight-Decomposed Low-Rank Adaptation", equation 5 and section 4.3.
    """
    wide = torch.promote_types(weight_oi.dtype, low.A.dtype)
    weight, b, a = (t.to(wide).unflatten(0, (low.blocks, -1)) for t in (weight_oi, low.B, low.A))
    own = weight if in_place and weight.is_contiguous() else None
    # A scale beyond the dtype is infinite in it, as in a product; as `alpha` torch would refuse it.
    scale = low.scale if finite_scale(low.scale, wide) else low.scale * float("inf")
    changed = torch.baddbmm(weight, b, a, alpha=scale, out=own).flatten(0, 1)  # one pass over W
    if magnitude_o is not None:
        changed = changed * (magnitude_o / changed.detach().norm(dim=1))[:, None]
    return changed.to(weight_oi.dtype)


def row_norms(weight_oi: Tensor, low: Factors) -> Tensor:
    """The norms |W + s·B·A| of the rows, (o,), a constant for gradients."""
    with torch.no_grad():
        return (weight_oi.to(low.A.dtype) + update(low)).norm(dim=1)


def lowrank(x_i: Tensor, low: Factors) -> Tensor:
    """The update's part of a linear layer's output, in A's dtype.

    Semantics:
        y(*, o) = s · sum_r B(o, r) · sum_i A(r, i) · x(*, i)        (B·A is never formed)
    """
    return F.linear(F.linear(x_i.to(low.A.dtype), low.A), low.B) * low.scale


def lowrank_rows(ids: Tensor, low: Factors) -> Tensor:
    """The update's part of an embedding's output: i counts the vocabulary, o the embedding's width.

    Semantics:
        y(*, o) = s · sum_r B(o, r) · A(r, ids(*))
    """
    return F.linear(F.embedding(ids, low.A.T), low.B) * low.scale


def lowrank_channels(h_r: Tensor, low: Factors, dimensions: int) -> Tensor:
    """The second half of a convolution's update: h (*, r, positions) holds what A, as a kernel, made of the input.

    Semantics, for each position:
        y(o) = s · sum_r B(o, r) · h(r)
    """
    kernel = low.B.reshape(*low.B.shape, *(1,) * dimensions)
    return CONVOLUTIONS[dimensions - 1](h_r, kernel) * low.scale
