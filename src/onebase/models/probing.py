"""What adapters do to a base's predictions on a few prompts: divergences of its logits, and answers."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from contextlib import ExitStack
from itertools import combinations
from typing import Any

import torch
from torch import Tensor

from onebase.adapters.adapter import Adapter
from onebase.adapters.injection import eject, eval_mode, inject, use
from onebase.config import Sampling
from onebase.data.template import PromptFormat, render_prompt
from onebase.diagnosis.measures import Effect, divergence
from onebase.errors import BaseError, DataError
from onebase.models.base import Base
from onebase.models.generation import format_of, generate

BASE = "base"  # the plain base among the names of the adapters


def prompt_ids(base: Base, prompts: Sequence[str], form: PromptFormat) -> list[list[int]]:
    """The ids of each prompt as it is rendered for an answer; fixed ones where the base has no tokenizer.

    By the base's own tokenizer: tokens that an adapter adds would mean nothing to the base it is compared with.

    Raises BaseError for a base that predicts no next token, DataError for a prompt that is empty or too long.
    """
    if base.kind != "causal":
        raise BaseError(
            f"predictions of {base.ref}", f"it is a base of kind {base.kind}, which has none of a next token"
        )
    if base.tokenizer is None:
        words: int = base.model.get_input_embeddings().weight.shape[0]  # pyright: ignore[reportCallIssue]
        return [list(range(1, 1 + min(8, words - 1)))]
    rows = [render_prompt(base.tokenizer, text, form) for text in prompts]
    for row, ids in enumerate(rows):
        if not 0 < len(ids) <= base.context:
            raise DataError(f"prompt {row + 1}", f"{len(ids)} tokens, and the base takes 1 to {base.context}")
    return rows


def divergences(
    base: Base, adapters: Mapping[str, Adapter], rows: Mapping[str, Sequence[list[int]]]
) -> dict[tuple[str, str], Effect]:
    """KL(first || second) of each pair of models, the plain base (named "base") first; all see the same ids.

    `rows` has the prompts' ids as each adapter was trained to see them. The base is compared with an adapter on
    that adapter's rows, two adapters on the rows of both. Holds one prompt's logits at a time.
    """
    owners: dict[tuple[int, ...], set[str]] = {}
    for name, own in rows.items():
        for ids in own:
            owners.setdefault(tuple(ids), set()).add(name)
    found: dict[tuple[str, str], list[tuple[Tensor, Tensor]]] = {}
    with ExitStack() as stack, torch.no_grad():
        stack.enter_context(eval_mode(base.model))
        for name, adapter in adapters.items():
            inject(base.model, adapter, name)
            stack.callback(eject, base.model, [name])
        for ids, asked in owners.items():
            logits = {name or BASE: _logits(base, ids, name) for name in (None, *adapters)}
            for first, second in combinations(logits, 2):
                if first != BASE or second in asked:
                    p, q = logits[first], logits[second]
                    changed = (p.argmax(1) != q.argmax(1)).double()
                    found.setdefault((first, second), []).append((divergence(p, q), changed))
    return {pair: _effect(found[pair]) for pair in combinations((BASE, *adapters), 2) if pair in found}


def _logits(base: Base, ids: Sequence[int], name: str | None) -> Tensor:
    """(tokens, vocabulary) in float32."""
    with use(base.model, name):
        result: Any = base.model(input_ids=torch.tensor([list(ids)], device=base.device))
    return result.logits[0].float().cpu()


def _effect(found: Sequence[tuple[Tensor, Tensor]]) -> Effect:
    nats, changed = (torch.cat(column) for column in zip(*found, strict=True))
    largest = float(nats.max()) if nats.isfinite().all() else math.nan
    return Effect(len(nats), float(nats.mean()), largest, float(changed.mean()))


def effect_of(base: Base, adapter: Adapter, prompts: Sequence[str]) -> Effect:
    """What one adapter does to the base on prompts that are rendered as it was trained to see them."""
    rows = prompt_ids(base, prompts, format_of(base, adapter))
    return divergences(base, {"adapter": adapter}, {"adapter": rows})[BASE, "adapter"]


def answers_of(
    base: Base, adapters: Mapping[str, Adapter], prompts: Sequence[str], sampling: Sampling
) -> dict[str, list[str]]:
    """The base's answers and each adapter's, prompts rendered for each as it was trained; by name."""
    models: dict[str, Adapter | None] = {BASE: None, **adapters}
    return {name: generate(base, prompts, adapter, sampling) for name, adapter in models.items()}
