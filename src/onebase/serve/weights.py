"""Frozen linear layers ready for inference: the ways to compute them, each a row of one table."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

from onebase.ops.adapted import Linear

Product = Callable[[Tensor], Tensor]
"""x (T, in) -> the layers' outputs side by side (T, sum of out)."""


def _plain(layers: Sequence[Linear]) -> Product:
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


PRODUCTS: dict[str, Callable[[Sequence[Linear]], Product]] = {"plain": _plain}
