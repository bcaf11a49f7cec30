"""The training kernels in C (elementwise.c, attention.c, lowrank.c): built on first use, and which tensors they take.

Every kernel has a twin in torch, which specifies it and computes where there is no compiler, on other devices and in
other dtypes. The two stand side by side in the op's own file; `natively` puts them together. A kernel's results do not
depend on the number of threads.
"""

from __future__ import annotations

import ctypes
from collections.abc import Callable, Sequence
from functools import cache, wraps
from pathlib import Path
from typing import Any, ParamSpec, TypeVar

import torch
from torch import Tensor

from onebase import native

P = ParamSpec("P")
R = TypeVar("R")

SOURCES = [
    Path(__file__).with_name(name) for name in ("kernels.h", "elementwise.c", "attention.c", "lowrank.c")
]
MACROS: dict[torch.dtype, tuple[str, ...]] = {torch.float32: (), torch.bfloat16: ("BFLOAT16",)}
GATES = {"silu": 0, "gelu_tanh": 1}  # the activations that gate's kernels know

_pointer, _int, _real = ctypes.c_void_p, ctypes.c_int64, ctypes.c_double


def _all(kind: Any, names: str) -> list[tuple[str, Any]]:
    return [(name, kind) for name in names.split()]


class Rows(ctypes.Structure):
    """A tensor's first element, and how many there are from row to row."""

    _fields_ = [("at", _pointer), ("row", _int)]


class Norm(ctypes.Structure):
    """elementwise.c's."""

    _fields_ = [("weight", _pointer), *_all(_int, "heads n shared centred"), ("eps", _real)]


class Rotation(ctypes.Structure):
    """elementwise.c's."""

    _fields_ = [*_all(_pointer, "cos sin"), *_all(_int, "n heads width interleaved")]


class Targets(ctypes.Structure):
    """elementwise.c's."""

    _fields_ = [
        *_all(_pointer, "counts edges ids losses"),
        *_all(_real, "scale softcap"),
        *_all(_int, "vocabulary wants"),
    ]


class Update(ctypes.Structure):
    """lowrank.c's."""

    _fields_ = [*_all(_pointer, "A B dA dB"), ("y", Rows), *_all(_int, "rank out"), ("scale", _real)]


class Heads(ctypes.Structure):
    """attention.c's."""

    _fields_ = [*_all(_pointer, "q k v out"), *_all(_int, "q_row k_row v_row out_row")]


class Forest(ctypes.Structure):
    """attention.c's."""

    _fields_ = [
        *_all(_pointer, "trees cuts spans"),
        *_all(_int, "count longest heads group width v_width window"),
        *_all(_real, "scale softcap"),
    ]


SIGNATURES: dict[str, list[Any]] = {
    "norm": [Rows, Rows, ctypes.POINTER(Norm), _int],
    "norm_backward": [Rows, Rows, Rows, Rows, ctypes.POINTER(Norm), _int],
    "rotate": [Rows, ctypes.POINTER(Rotation), _int],
    "gate": [Rows, Rows, Rows, _int, _int, _int],
    "gate_backward": [Rows, Rows, Rows, Rows, Rows, _int, _int, _int],
    "cross_entropy": [Rows, ctypes.POINTER(Targets), _int],
    "update": [ctypes.POINTER(Update), _int, Rows, _int, _pointer, _int],
    "update_backward": [ctypes.POINTER(Update), _int, Rows, Rows, _int, _pointer, _pointer, _int],
    "attention": [ctypes.POINTER(Forest), ctypes.POINTER(Heads), ctypes.POINTER(Heads)],
}


@cache
def library(dtype: torch.dtype) -> Any | str:
    """The kernels for tensors of this dtype, built on first use; or, as a text, why there are none."""
    if dtype not in MACROS:
        return f"no kernels for {dtype}"
    loaded = native.load("kernels", SOURCES, MACROS[dtype])
    if not isinstance(loaded, str):
        for name, arguments in SIGNATURES.items():
            function = getattr(loaded, f"onebase_{name}")
            function.restype, function.argtypes = None, [*arguments, ctypes.c_int]
    return loaded


def takes(x: Tensor) -> bool:
    """Whether the kernels compute with tensors like this one."""
    return x.device.type == "cpu" and not isinstance(library(x.dtype), str)


def natively(kernel: Callable[P, R]) -> Callable[[Callable[P, R]], Callable[P, R]]:
    """Let this kernel stand for the decorated function wherever it takes the first argument's tensor.

    A kernel gives NotImplemented for an unusual case; the function itself stays at hand as `__wrapped__`.
    """

    def around(twin: Callable[P, R]) -> Callable[P, R]:
        @wraps(twin)
        def either(*args: P.args, **kwargs: P.kwargs) -> R:
            first: Any = args[0]
            taken = takes(first if isinstance(first, Tensor) else first[0])
            done: Any = kernel(*args, **kwargs) if taken else NotImplemented
            return twin(*args, **kwargs) if done is NotImplemented else done

        return either

    return around


def call(name: str, like: Tensor, *arguments: Any) -> None:
    """Run a kernel on tensors of the dtype of `like`, with as many threads as torch."""
    getattr(library(like.dtype), f"onebase_{name}")(*arguments, torch.get_num_threads())


def rows(x: Tensor | None) -> Rows:
    """A tensor as the kernels take it; nothing for None."""
    return Rows() if x is None else Rows(x.data_ptr(), x.stride(0))


def by_row(*tensors: Tensor | None) -> bool:
    """Whether each is of two dimensions or more, with rows that lie anywhere and are each in one piece."""
    return all(x is None or _by_row(x) for x in tensors)


def _by_row(x: Tensor) -> bool:
    strides = x.stride()
    if len(strides) == 2:  # nearly always, and this is asked thousands of times a step
        return strides[1] == 1 or x.shape[1] == 1
    return len(strides) > 2 and _in_one_piece(x.shape[1:], strides[1:])


def _in_one_piece(shape: Sequence[int], strides: Sequence[int]) -> bool:
    size = 1
    for length, stride in zip(reversed(shape), reversed(strides), strict=True):
        if length != 1 and stride != size:
            return False
        size *= length
    return True
