"""Answers from a base, with an adapter or without: prompts are rendered just as training rendered them."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from typing import Any

import torch
from transformers import GenerationConfig, TextStreamer

from onebase.adapters.adapter import Adapter
from onebase.adapters.injection import injected
from onebase.config import Sampling
from onebase.data.pack import bucketed
from onebase.data.read import Example
from onebase.data.template import PromptFormat, render_prompt
from onebase.errors import BaseError, DataError
from onebase.models.base import Base
from onebase.models.loss import keeps_logits
from onebase.models.vocabulary import for_adapter

Stream = Callable[[str], None]


def generate(
    base: Base,
    prompts: Sequence[str] | str,
    adapter: Adapter | None = None,
    sampling: Sampling | None = None,
    prompt_format: PromptFormat | None = None,
) -> list[str]:
    """One answer for each prompt, from the base with this adapter (None: the plain base).

    Prompts are rendered in the format that the adapter was trained with, else through the base's chat template
    if it has one. Raises DataError for a prompt that leaves no room for an answer.
    """
    texts = [prompts] if isinstance(prompts, str) else list(prompts)
    form, base = prompt_format or format_of(base, adapter), for_adapter(base, adapter)
    ids = [render_prompt(_tokenizer(base), text, form) for text in texts]
    with injected(base.model, adapter, "generate"):
        return decode(base, list(generate_ids(base, ids, sampling or Sampling())))


def answers(base: Base, examples: Sequence[Example], form: PromptFormat, sampling: Sampling) -> list[str]:
    """One answer for each example, from whatever adapter the call has chosen."""
    ids = [render_prompt(_tokenizer(base), example, form) for example in examples]
    return decode(base, list(generate_ids(base, ids, sampling)))


def format_of(base: Base, adapter: Adapter | None) -> PromptFormat:
    """The prompt format an adapter was trained with; without one, the base's chat template if it has any."""
    if adapter is not None and adapter.origin.prompt:
        return PromptFormat.from_dict(adapter.origin.prompt)
    return PromptFormat(chat=bool(getattr(base.tokenizer, "chat_template", None)))


def _tokenizer(base: Base) -> Any:
    if base.kind != "causal" or base.tokenizer is None:
        raise BaseError(
            f"generate with {base.ref}", f"it is a base of kind {base.kind} without a text head or tokenizer"
        )
    return base.tokenizer


def decode(base: Base, ids: Sequence[list[int]]) -> list[str]:
    """Token ids as text, without special tokens."""
    return [str(_tokenizer(base).decode(row, skip_special_tokens=True)) for row in ids]


def generate_ids(
    base: Base, prompts: Sequence[list[int]], sampling: Sampling, stream: Stream | None = None
) -> Iterator[list[int]]:
    """The new token ids for each prompt, in order, without the stop token.

    Prompts of like length share a batch, filled up on the left. `stream` gets the text as it comes (one prompt).
    """
    for row, prompt in enumerate(prompts):
        if len(prompt) >= base.context:
            found = f"{len(prompt)} tokens, and the base takes {base.context}, answer included"
            raise DataError(f"prompt {row + 1}", found, hint="shorten it")
    results: dict[int, list[int]] = {}
    for batch in _batches([len(prompt) for prompt in prompts], base.context, sampling):
        rows = [prompts[index] for index in batch]
        results |= dict(zip(batch, _generate_batch(base, rows, sampling, stream), strict=True))
    yield from (results[index] for index in range(len(prompts)))


def _batches(lengths: Sequence[int], context: int, sampling: Sampling) -> list[list[int]]:
    """Prompts that leave less room than an answer may take go alone, for a batch's longest sets the room of all."""
    roomy = [row for row, length in enumerate(lengths) if length + sampling.max_new_tokens <= context]
    batches = bucketed([lengths[row] for row in roomy], sampling.batch_size)
    return [[roomy[index] for index in batch] for batch in batches] + [
        [row] for row in range(len(lengths)) if row not in set(roomy)
    ]


def _generate_batch(
    base: Base, prompts: Sequence[list[int]], sampling: Sampling, stream: Stream | None
) -> list[list[int]]:
    width = max(map(len, prompts))
    ids = torch.tensor([[base.pad_id] * (width - len(p)) + p for p in prompts], device=base.device)
    mask = torch.tensor([[0] * (width - len(p)) + [1] * len(p) for p in prompts], device=base.device)
    # As an index, not as a number: that leaves a slice with gaps, for whose product torch copies the head for each row.
    last = {"logits_to_keep": torch.tensor([-1], device=base.device)} if keeps_logits(base.model) else {}
    with torch.no_grad(), torch.random.fork_rng():
        torch.manual_seed(sampling.seed)
        out: Any = base.model.generate(  # pyright: ignore[reportCallIssue]
            input_ids=ids,
            attention_mask=mask,
            **last,
            generation_config=_config(base, sampling, min(sampling.max_new_tokens, base.context - width)),
            streamer=_Streamer(base.tokenizer, stream) if stream else None,
        )
    return [_until_stop(row[width:].tolist(), base.stop_ids) for row in out]


def _config(base: Base, sampling: Sampling, new_tokens: int) -> GenerationConfig:
    chance = {"temperature": sampling.temperature, "top_p": sampling.top_p, "top_k": sampling.top_k}
    return GenerationConfig(
        max_new_tokens=new_tokens,
        do_sample=sampling.temperature > 0,
        eos_token_id=list(base.stop_ids) or None,
        pad_token_id=base.pad_id,
        **(chance if sampling.temperature > 0 else {}),
    )


def _until_stop(ids: list[int], stops: Sequence[int]) -> list[int]:
    end = next((index for index, token in enumerate(ids) if token in stops), len(ids))
    return ids[:end]


class _Streamer(TextStreamer):
    """Hands text on as soon as it can no longer change."""

    def __init__(self, tokenizer: Any, stream: Stream) -> None:
        super().__init__(tokenizer, skip_prompt=True, skip_special_tokens=True)
        self._stream = stream

    def on_finalized_text(self, text: str, stream_end: bool = False) -> None:
        self._stream(text)
