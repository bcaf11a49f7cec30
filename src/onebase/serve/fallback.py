"""The slow way that is always right: the model's own forward, one sequence at a time, with whatever adapter."""

from __future__ import annotations

from collections.abc import Sequence
from threading import Lock
from typing import Any

import torch
from torch import Tensor, nn

from onebase.adapters.injection import eject, inject, use
from onebase.serve.pool import Pinned


class Fallback:
    """Sequences by slot, each with transformers' own cache. Adapters are on the model while a sequence uses them."""

    def __init__(self, model: nn.Module, lock: Lock) -> None:
        self._model: Any = model
        self._lock = lock
        self._names: dict[int, str | None] = {}
        self._caches: dict[int, Any] = {}

    def start(self, slot: int, pinned: Pinned | None) -> None:
        """A sequence begins in a slot. Raises what `inject` raises."""
        name = None if pinned is None else f"{pinned.name}@{pinned.version}"
        if pinned is not None and name is not None and name not in self._names.values():
            with self._lock:
                inject(self._model, pinned.adapter, name)
        self._names[slot], self._caches[slot] = name, None

    def stop(self, slot: int) -> None:
        """The slot's sequence is over."""
        self._caches.pop(slot, None)
        name = self._names.pop(slot, None)
        if name is not None and name not in self._names.values():
            with self._lock:
                eject(self._model, [name])

    @torch.inference_mode()
    def forward(self, slot: int, tokens: Sequence[int]) -> Tensor:
        """The sequence's next tokens; the last one's logits (vocabulary,), in at least float32."""
        ids = torch.tensor([list(tokens)], device=self._model.device)
        with use(self._model, self._names[slot]):
            output = self._model(input_ids=ids, past_key_values=self._caches[slot], use_cache=True)
        self._caches[slot] = output.past_key_values
        logits = output.logits[0, -1]
        return logits.to(torch.promote_types(logits.dtype, torch.float32))
