"""The low-rank update: W + s·B·A, and its product with an input. Everything else in onebase calls these."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

# Shape suffixes: i = in features, o = out features, r = rank, * = any leading sizes.


def effective_weight(weight_oi: Tensor, a_ri: Tensor, b_or: Tensor, scale: float) -> Tensor:
    """W + s·B·A, computed in float32 (float64 for float64) and cast once to W's dtype.

    Source: Hu et al. 2021, "LoRA: Low-Rank Adaptation of Large Language Models", equation 3.
    """
    wide = torch.promote_types(weight_oi.dtype, a_ri.dtype)
    return (weight_oi.to(wide) + scale * (b_or @ a_ri)).to(weight_oi.dtype)


def lowrank(x_i: Tensor, a_ri: Tensor, b_or: Tensor, scale: float) -> Tensor:
    """The update's part of a linear layer's output, in A's dtype.

    Semantics:
        y(*, o) = s · sum_r B(o, r) · sum_i A(r, i) · x(*, i)        (B·A is never formed)
    """
    return F.linear(F.linear(x_i.to(a_ri.dtype), a_ri), b_or) * scale


def lowrank_rows(ids: Tensor, a_ri: Tensor, b_or: Tensor, scale: float) -> Tensor:
    """The update's part of an embedding's output: i counts the vocabulary, o the embedding's width.

    Semantics:
        y(*, o) = s · sum_r B(o, r) · A(r, ids(*))
    """
    return F.linear(F.embedding(ids, a_ri.T), b_or) * scale
