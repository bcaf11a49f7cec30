"""The decoder's step as native code: step.c, built by native.py of the package, and its structs filled from a model.

Nothing here is needed: where there is no compiler or no CPU, the runner computes the same with torch.
"""

from __future__ import annotations

import ctypes
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor

from onebase import native
from onebase.models.reading import ReadLayer, ReadModel, Unsupported
from onebase.ops.adapted import Linear
from onebase.ops.decoder import Groups
from onebase.ops.grouped import Place
from onebase.ops.lowrank import Factors
from onebase.ops.norms import Norm
from onebase.ops.rotary import Rotation
from onebase.serve.cache import Cache
from onebase.serve.weights import Held, Holder

SOURCE = Path(__file__).with_name("step.c")
ACTIVATIONS = {"silu": 0, "gelu": 1, "gelu_tanh": 2}

_pointer, _int, _real = ctypes.c_void_p, ctypes.c_int64, ctypes.c_double


def _fields(**kinds: Any) -> list[tuple[str, Any]]:
    return list(kinds.items())


class _Linear(ctypes.Structure):
    _fields_ = _fields(
        weight=_pointer, scales=_pointer, least=_pointer, bias=_pointer, rows=_int, columns=_int, format=_int
    )


class _Group(ctypes.Structure):
    _fields_ = _fields(layer=_Linear * 3, A=_pointer, B=_pointer * 3, count=_int, rank=_int)


class _Update(ctypes.Structure):
    _fields_ = _fields(A=_pointer, B=_pointer, rank=_int, scale=_real)


class _Norm(ctypes.Structure):
    _fields_ = _fields(weight=_pointer, size=_int, centred=_int, eps=_real)


class _Layer(ctypes.Structure):
    _fields_ = _fields(
        group=_Group * 4,
        norm=_Norm * 4,
        q_norm=_Norm,
        k_norm=_Norm,
        cos=_pointer,
        sin=_pointer,
        k=_pointer,
        v=_pointer,
        scale=_real,
        softcap=_real,
        window=_int,
    )


class _Model(ctypes.Structure):
    _fields_ = _fields(
        layer=ctypes.POINTER(_Layer),
        norm=_Norm,
        head=_Linear,
        **dict.fromkeys("layers hidden heads kv_heads width inner context turned".split(), _int),
        **dict.fromkeys("interleaved parallel activation".split(), _int),
        residual=_real,
    )


class _Batch(ctypes.Structure):
    _fields_ = _fields(
        **dict.fromkeys("slot position factors wanted x logits scratch".split(), _pointer),
        **dict.fromkeys("tokens wants adapted".split(), _int),
    )


def native_library() -> Any | str:
    """The built step, from the cache folder if it is there; or, as a text, why there is none."""
    library = native.load("step", [SOURCE])
    if isinstance(library, str):
        return library
    library.onebase_scratch.restype = ctypes.c_int64
    library.onebase_scratch.argtypes = [ctypes.POINTER(_Model), _int, _int, _int]
    library.onebase_fill.restype = None
    library.onebase_fill.argtypes = [ctypes.POINTER(_Model), _int, ctypes.POINTER(_Update)]
    library.onebase_step.restype = None
    library.onebase_step.argtypes = [ctypes.POINTER(_Model), ctypes.POINTER(_Batch), _int, _int]
    return library


class Token(NamedTuple):
    """Where a token stands: its slot, its position, and the slot of its factors (-1: it has none)."""

    slot: int
    position: int
    factors: int


class NativeStep:
    """A model's step on a cache. Raises Unsupported with the reason where it cannot be."""

    def __init__(
        self, read: ReadModel, cache: Cache, rotations: Mapping[str | None, Rotation], hold: Holder
    ) -> None:
        library = native_library()
        if isinstance(library, str):
            raise Unsupported(library)
        if cache.k.dtype != torch.float32 or cache.k.device.type != "cpu":
            raise Unsupported("the native step is for a CPU, with keys and values in float32")
        self._library, self._cache = library, cache
        self._kept: list[Any] = [rotations]  # what the structs point to
        self.bytes = 0  # of the weights' copies
        layers = (_Layer * len(read.layers))()
        for number, layer in enumerate(read.layers):
            self._fill_layer(layers[number], layer, number, rotations, hold)
        first, spec = read.layers[0].frozen, read.layers[0].frozen.attention
        turned = {rotation.cos.shape[1] for rotation in rotations.values()}
        if len(turned) > 1:
            raise Unsupported("its layers rotate different numbers of channels")
        self._model = _Model(
            layer=layers,
            norm=self._norm(read.norm),
            head=self._linear(hold(Linear(read.head.weight, read.head.bias), head=True)),
            layers=len(read.layers),
            hidden=read.head.weight.shape[1],
            heads=spec.heads,
            kv_heads=spec.kv_heads,
            width=spec.width,
            inner=first.linears.down[0].weight.shape[1],
            context=cache.shape.context,
            turned=max(turned, default=0),
            interleaved=int(read.interleaved),
            parallel=int(first.parallel),
            activation=ACTIVATIONS[first.activation],
            residual=first.residual,
        )
        self._layers, self._rank = layers, 0
        self._vocabulary = read.head.weight.shape[0]

    def _fill_layer(
        self,
        to: Any,
        layer: ReadLayer,
        number: int,
        rotations: Mapping[str | None, Rotation],
        hold: Holder,
    ) -> None:
        frozen, spec = layer.frozen, layer.frozen.attention
        for place, group in enumerate(frozen.linears):
            to.group[place].count = len(group)
            for index, one in enumerate(group):
                to.group[place].layer[index] = self._linear(hold(one, head=False))
        for place, norm in enumerate(frozen.norms):
            to.norm[place] = self._norm(norm)
        to.q_norm, to.k_norm = self._norm(spec.q_norm), self._norm(spec.k_norm)
        if layer.rotates:
            rotation = rotations[layer.rotary_type]
            to.cos, to.sin = rotation.cos.data_ptr(), rotation.sin.data_ptr()
        to.k, to.v = self._cache.k[number].data_ptr(), self._cache.v[number].data_ptr()
        to.scale, to.softcap = spec.scoring.scale, spec.scoring.softcap or 0.0
        to.window = layer.window or 0

    def _linear(self, held: Held) -> _Linear:
        tensors = [held.weight, held.scales, held.least, held.bias]
        self._kept.append(tensors)
        self.bytes += held.copied
        pointers = [0 if one is None else one.data_ptr() for one in tensors]
        return _Linear(*pointers, held.rows, held.columns, held.format)

    def _norm(self, norm: Norm | None) -> _Norm:
        if norm is None:
            return _Norm()
        if norm.weight.ndim > 1 or norm.weight.dtype != torch.float32:
            raise Unsupported("the native step has no norm of that shape")
        weight = norm.weight.contiguous()
        self._kept.append(weight)
        return _Norm(weight.data_ptr(), weight.numel(), int(norm.centred), norm.eps)

    def use(self, factors: Sequence[Groups[Place]]) -> None:
        """Let the updates come from these slots from now on; the caller keeps them."""
        for layer, places in zip(self._layers, factors, strict=bool(factors)):
            for group, place in zip(layer.group, places, strict=True):
                group.A, group.rank = place.A.data_ptr(), place.rank
                for index, b in enumerate(place.B):
                    group.B[index] = b.data_ptr()
        self._rank = factors[0].qkv.rank if factors else 0

    def fill(self, slot: int, updates: Sequence[Factors | None]) -> None:
        """Put an adapter's updates (None: it has none there) of all layers, in their order, into a slot of `use`."""
        # Kept while they are read.
        sides = [low and (low.A.contiguous(), low.B.contiguous()) for low in updates]
        rows = (_Update * len(updates))()
        for row, low, pair in zip(rows, updates, sides, strict=True):
            if low is not None and pair is not None:
                row.A, row.B = pair[0].data_ptr(), pair[1].data_ptr()
                row.rank, row.scale = pair[0].shape[0], low.scale
        self._library.onebase_fill(self._model, slot, rows)

    def forward(self, hidden: Tensor, tokens: Sequence[Token], wanted: Sequence[int]) -> Tensor:
        """The head's output (wanted, vocabulary) for the embedded tokens (T, hidden), which are overwritten."""
        threads, stride, count = torch.get_num_threads(), 3 * self._rank, len(tokens)
        size = self._library.onebase_scratch(self._model, count, stride, threads)
        scratch, logits = torch.empty(size), torch.empty(len(wanted), self._vocabulary)
        facts = torch.tensor([*zip(*tokens, strict=True)], dtype=torch.int32)
        ends = torch.tensor(wanted, dtype=torch.int32)
        slot, position, factors = (row.data_ptr() for row in facts)
        pointers = (slot, position, factors, ends.data_ptr())
        adapted = int(any(token.factors >= 0 for token in tokens))
        batch = _Batch(
            *pointers,
            hidden.data_ptr(),
            logits.data_ptr(),
            scratch.data_ptr(),
            count,
            len(wanted),
            adapted,
        )
        self._library.onebase_step(self._model, batch, stride, threads)
        return logits
