"""Products with a weight, by the library that is fastest at them: torch's own choice, or in float32 on x86 oneDNN.

torch's float32 products on a CPU are MKL's, which on AMD's processors reach half of what oneDNN's do; on Intel's both
are alike. bfloat16 is oneDNN's already. Which library computes depends on tensor and machine alone, never on a clock:
the same run gives the same bits again.
"""

from __future__ import annotations

from functools import cache

import torch
from torch import Tensor

MEASURED = ("AVX2", "AVX512")  # the instruction sets on which oneDNN was seen to be as fast or faster


def product(x: Tensor, weight_oi: Tensor, bias: Tensor | None = None) -> Tensor:
    """x·Wᵀ + bias, (T, o), contiguous, without autograd. x (T, i); a transposed view as weight costs nothing more."""
    if _onednn(x):
        return torch.ops.mkldnn._linear_pointwise(x, weight_oi, bias, "none", [], "")
    return x @ weight_oi.T if bias is None else torch.addmm(bias, x, weight_oi.T)


def added_product(y: Tensor, x: Tensor, weight_oi: Tensor) -> Tensor:
    """y + x·Wᵀ, in the memory of y where that is faster: use the result, and y no more."""
    if _onednn(x):
        return torch.ops.mkldnn._linear_pointwise.binary(x, y, weight_oi, None, "add")
    return y.addmm_(x, weight_oi.T)


def _onednn(x: Tensor) -> bool:
    return x.dtype == torch.float32 and x.device.type == "cpu" and x.numel() > 0 and _has_onednn()


@cache
def _has_onednn() -> bool:
    """Whether oneDNN's product is there (torch calls it private), and right on a small case."""
    if not torch.backends.mkldnn.is_available() or torch.backends.cpu.get_cpu_capability() not in MEASURED:
        return False
    x, weight = torch.arange(6.0).view(2, 3), torch.arange(12.0).view(3, 4).T
    try:
        plain = torch.ops.mkldnn._linear_pointwise(x, weight, None, "none", [], "")
        added = torch.ops.mkldnn._linear_pointwise.binary(x, plain, weight, None, "add")
    except (AttributeError, RuntimeError):
        return False
    return torch.equal(plain, x @ weight.T) and torch.equal(added, 2 * plain)
