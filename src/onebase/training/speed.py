"""How fast this machine does what a training step is made of, measured on the spot, and the time that follows."""

from __future__ import annotations

import time
from collections import Counter
from collections.abc import Callable, Collection, Mapping
from functools import partial
from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn.functional import linear, scaled_dot_product_attention

from onebase.ops.products import product as weight_product
from onebase.training.work import (
    ATTENTION,
    ELEMENTWISE,
    FACTORS,
    FULL,
    OPTIMIZER,
    Attention,
    Decoder,
    Load,
    Product,
    attention_flop,
    product_flop,
    step_products,
)

SECONDS = 2.0  # what measuring may take in all; of that, the parts beside the matrix products:
ATTENTION_SECONDS, STREAM_SECONDS = 0.2, 0.2
RUNS = 3  # each product is cut so that about this many runs fit into its share: one to warm up, then the best
LARGEST = 1 << 25  # values of the largest matrix that is measured: 128 MiB in float32, beyond any cache
SMALLEST = 1 << 20  # operations below which nothing is cut: some 10 microseconds
PROBE = Product(256, 256, 256)  # its speed says how much fits: a millisecond, and nearly full speed
STREAM = 1 << 25  # float32 values copied to measure the memory: 128 MiB each way, beyond any cache


class Arithmetic(NamedTuple):
    """How products are computed: x·Wᵀ, and whether those of float32 factors are in the base's dtype too."""

    multiply: Callable[[Tensor, Tensor], Tensor]
    narrow: bool


ENGINE, MODEL = (
    Arithmetic(weight_product, True),
    Arithmetic(linear, False),
)  # the engine's, a model's own layers'


class Prediction(NamedTuple):
    """A run's time, the part that takes most of it, and the seconds of each part."""

    seconds: float
    limit: str
    parts: Mapping[str, float]


def predict(
    per_token: Mapping[str, float],
    per_step: Mapping[str, float],
    speeds: Mapping[str, float],
    tokens: int,
    steps: int,
) -> Prediction:
    """The time of `tokens` in `steps` optimiser steps, each part after the other.

    `per_token` and `per_step` hold operations (or bytes) by part, `speeds` the operations (or bytes) a second of
    each of these parts.
    """
    work = {part: amount * tokens for part, amount in per_token.items()}
    for part, amount in per_step.items():
        work[part] = work.get(part, 0.0) + amount * steps
    parts = {part: amount / speeds[part] for part, amount in work.items()}
    return Prediction(sum(parts.values()), max(parts, key=parts.__getitem__, default=""), parts)


def part_speed(products: Counter[Product], measured: Mapping[Product, float]) -> float:
    """Operations a second over all these products, each at its own speed."""
    seconds = sum(product.flop * times / measured[product] for product, times in products.items())
    return product_flop(products) / seconds


def bound_seconds(decoder: Decoder, load: Load, measured: Mapping[Product, float]) -> float:
    """The least time of a batch's matrix products: all at the speed of the fastest one measured."""
    parts = step_products(decoder, load).values()
    return sum(product_flop(products) for products in parts) / max(measured.values())


def measure_speeds(
    decoder: Decoder, load: Load, dtype: torch.dtype, device: torch.device, how: Arithmetic = ENGINE
) -> dict[str, float]:
    """Operations (or bytes) a second of every part of a step with such batches, in about `SECONDS`.

    `dtype` is the base's; what is trained is float32 whatever that is.
    """
    parts = step_products(decoder, load)
    wide = (FULL,) if how.narrow else (FACTORS, FULL)
    dtypes = {part: torch.float32 if part in wide else dtype for part in parts}
    count = sum(len(products) for products in parts.values())
    for_one = (SECONDS - ATTENTION_SECONDS - STREAM_SECONDS) / max(count, 1)
    speeds = {
        part: part_speed(products, measure(products, dtypes[part], device, for_one * len(products), how))
        for part, products in parts.items()
    }
    length = max(
        1, round(2 * load.pairs / max(load.tokens, 1)) - 1
    )  # a lone segment has length·(length+1)/2 pairs
    speeds[ATTENTION] = measure_attention(decoder.attention, length, dtype, device)
    speeds[ELEMENTWISE] = speeds[OPTIMIZER] = measure_stream(device)
    return speeds


# -- Measuring: the best of a few runs, after one to warm up.


def measure(
    products: Collection[Product],
    dtype: torch.dtype,
    device: torch.device | str = "cpu",
    seconds: float = SECONDS,
    how: Arithmetic = ENGINE,
) -> dict[Product, float]:
    """Operations a second of x·Wᵀ, or y + x·Wᵀ, in each of these shapes, in about so many seconds for all together.

    A product that is too large for its share of the time is measured with its largest sizes halved: beyond a few
    hundred rows or columns the speed hardly changes.
    """
    device = torch.device(device)
    end = time.perf_counter() + seconds
    rough = _product_speed(PROBE, dtype, device, 0.0, how)
    found: dict[Product, float] = {}
    wanted = sorted(set(products), key=lambda product: product.flop)  # small ones leave time for large ones
    for left, product in zip(range(len(wanted), 0, -1), wanted, strict=True):
        share = max(0.0, end - time.perf_counter()) / left
        found[product] = _product_speed(cut(product, rough * share / RUNS), dtype, device, share / RUNS, how)
    return found


def cut(product: Product, flop: float) -> Product:
    """The product, its largest sizes halved until it takes `flop` operations and `LARGEST` values a matrix at most."""
    sizes = list(product[:3])
    while True:
        rows, inner, columns = sizes
        small = product._replace(rows=rows, inner=inner, columns=columns)
        largest = max(rows * inner, inner * columns, rows * columns)
        if small.flop <= max(flop, SMALLEST) and largest <= LARGEST:
            return small
        widest = sizes.index(max(sizes))
        sizes[widest] = -(-sizes[widest] // 2)


def _product_speed(
    product: Product, dtype: torch.dtype, device: torch.device, seconds: float, how: Arithmetic
) -> float:
    rows, inner, columns, added = product
    x_mk = torch.ones(rows, inner, dtype=dtype, device=device)
    weight_nk = torch.ones(columns, inner, dtype=dtype, device=device)
    y_mn = torch.zeros(rows, columns, dtype=dtype, device=device)
    run = partial(y_mn.addmm_, x_mk, weight_nk.T) if added else partial(how.multiply, x_mk, weight_nk)
    return product.flop / _best(run, device, seconds)


def measure_attention(
    attention: Attention,
    length: int,
    dtype: torch.dtype,
    device: torch.device | str = "cpu",
    seconds: float = ATTENTION_SECONDS,
) -> float:
    """Operations a second of causal attention over one segment, forward and backward, as `attention_flop` counts."""
    device = torch.device(device)
    shape = (3, 1, attention.heads, length, attention.width)
    query, key, value = torch.ones(shape, dtype=dtype, device=device).requires_grad_().unbind()

    def run() -> None:
        with torch.enable_grad():
            output: Tensor = scaled_dot_product_attention(query, key, value, is_causal=True)
        torch.autograd.grad(output, (query, key, value), output.detach())

    one = Attention(1, 1, attention.heads, attention.width)
    return attention_flop(one, length * (length + 1) // 2) / _best(run, device, seconds)


def measure_stream(device: torch.device | str = "cpu", seconds: float = STREAM_SECONDS) -> float:
    """Bytes a second that the memory reads and writes, from a copy that no cache holds."""
    device = torch.device(device)
    source, target = (torch.ones(STREAM, device=device) for _ in range(2))
    return 2 * source.nbytes / _best(lambda: target.copy_(source), device, seconds)


def _best(run: Callable[[], object], device: torch.device, seconds: float) -> float:
    """The shortest of the runs that fit into so many seconds, one at least, after one to warm up."""
    best, spent = float("inf"), 0.0
    _timed(run, device)
    while spent == 0.0 or spent < seconds:
        took = max(_timed(run, device), 1e-9)  # a coarse clock may see nothing
        best, spent = min(best, took), spent + took
    return best


def _timed(run: Callable[[], object], device: torch.device) -> float:
    start = time.perf_counter()
    run()
    if device.type != "cpu":
        getattr(torch, device.type).synchronize()
    return time.perf_counter() - start
