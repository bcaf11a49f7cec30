"""Weights rounded to few bits and back, as a quantised base gives them to its products; and what they would take."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from onebase.adapters.layers import base_modules
from onebase.adapters.targets import output_head

SCALE_BYTES = 2  # a float16 a block


def rounded(weight_oi: Tensor, bits: int, block: int) -> Tensor:
    """The weight after symmetric rounding to `bits`, each block of `block` inputs (0: the row) by its own scale.

    Integers of -(2^(bits-1) - 1) to 2^(bits-1) - 1, the scale is the block's largest value over that, in float16.
    """
    top = 2 ** (bits - 1) - 1
    width = block or weight_oi.shape[1]
    blocks = weight_oi.float().reshape(weight_oi.shape[0], -1, width)
    scale = (blocks.abs().amax(-1, keepdim=True) / top).half().float().clamp_min(1e-12)
    return ((blocks / scale).round().clamp(-top, top) * scale).reshape(weight_oi.shape).to(weight_oi.dtype)


def quantise(model: nn.Module, bits: int, block: int) -> None:
    """Round every linear weight but the head's in place, in a model that is the caller's own."""
    head = output_head(model)
    with torch.no_grad():
        for _, module in base_modules(model):
            if isinstance(module, nn.Linear) and module is not head:
                module.weight.data = rounded(module.weight, bits, block)


def stored_bytes(model: nn.Module, bits: int, block: int, rest: int = 2) -> int:
    """What the model would take: linear weights as integers and scales, all else in `rest` bytes a value."""
    head = output_head(model)
    linear = [m.weight for _, m in base_modules(model) if isinstance(m, nn.Linear) and m is not head]
    packed = sum(w.numel() * bits // 8 + SCALE_BYTES * w.numel() // (block or w.shape[1]) for w in linear)
    whole = sum(p.numel() for p in model.parameters())
    return packed + rest * (whole - sum(w.numel() for w in linear))
