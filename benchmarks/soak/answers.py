"""What every adapter must answer: greedy tokens from transformers, each adapter alone, cut where a tie comes near."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any, NamedTuple

import torch
from transformers import GenerationConfig

from benchmarks.evidence.tiny import tiny_base
from onebase.adapters.adapter import Adapter, Origin
from onebase.adapters.injection import injected, new_adapter
from onebase.config import LoraConfig
from onebase.models.base import Base
from onebase.serve.prompts import Prompts
from onebase.transforms.arithmetic import combine
from onebase.transforms.combining import Recipe

RANKS = (8, 4, 16)  # of the adapters, in turns
STRENGTH = 0.12  # of an update, whatever its rank: enough that the answers differ
CLOSE = 2e-3  # two logits nearer than this part of the largest may change places by rounding
SHORTEST = 4  # tokens; a shorter answer says too little
UNFINISHED = "\N{REPLACEMENT CHARACTER}"

TOPICS = (
    "The kettle broke after two days, and nobody answers my letters.",
    "In the beginning, the sea covered everything that we call land today",
    "def area(radius):\n    return",
    "Dear Ada,\nthank you for the garden bench. ",
    "Question: why is the sky blue?\nAnswer:",
    "1, 1, 2, 3, 5, 8,",
)
LONG = " ".join(TOPICS[number % len(TOPICS)] for number in range(5))
TEMPLATE = (
    "{% for m in messages %}[{{ m['role'] }}] {{ m['content'] }}\n{% endfor %}"
    "{% if add_generation_prompt %}[assistant] {% endif %}"
)


class Question(NamedTuple):
    """A prompt, by the route that takes it."""

    route: str
    given: Mapping[str, Any]  # of the body


QUESTIONS = (
    *(Question("/v1/completions", {"prompt": text}) for text in (*TOPICS, LONG, f"{LONG} {TOPICS[0]}")),
    *(
        Question("/v1/chat/completions", {"messages": [{"role": "user", "content": text}]})
        for text in TOPICS[:4]
    ),
)


class Answer(NamedTuple):
    """What must come back."""

    text: str
    tokens: int
    finish: str


class Truth(NamedTuple):
    """The greedy tokens of one adapter for one question, as far as no tie comes near; `ended`: then it stops."""

    tokens: tuple[int, ...]
    ended: bool

    @property
    def longest(self) -> int:
        """The most tokens that may be asked for."""
        return len(self.tokens) + self.ended

    def answer(self, base: Base, count: int) -> Answer:
        """The answer of at most `count` tokens."""
        ids = list(self.tokens[:count])
        ended = self.ended and count > len(self.tokens)
        text = base.tokenizer.decode(ids, skip_special_tokens=True) if ids else ""
        return Answer(bare(text), len(ids), "stop" if ended else "length")


def bare(text: str) -> str:
    """Without what may be half a character at its end: an answer may end anywhere."""
    return text.rstrip(UNFINISHED)


def save_tiny_base(folder: Path) -> str:
    """A random base of a few thousand weights, with a tokenizer and a chat template, in a folder."""
    base = tiny_base("float32")
    for parameter in base.model.parameters():
        parameter.data.mul_(4.0)  # drawn so small, all tokens would be nearly as likely
    base.tokenizer.chat_template = TEMPLATE
    base.model.save_pretrained(folder)
    base.tokenizer.save_pretrained(folder)
    return str(folder)


def random_adapter(base: Base, number: int, rank: int = 0) -> Adapter:
    """A seed-made update of all linear layers, unlike those of other numbers."""
    rank = rank or RANKS[number % len(RANKS)]
    adapter = new_adapter(base.model, LoraConfig(rank=rank, alpha=2 * rank), number, Origin(task="CAUSAL_LM"))
    draw = torch.Generator().manual_seed(1000 + number)
    low = {
        path: one._replace(B=torch.randn(one.B.shape, generator=draw) * STRENGTH / rank**0.5)
        for path, one in adapter.lowrank.items()
    }
    return replace(adapter, lowrank=low)


def mixed(adapters: Sequence[Adapter], weights: Sequence[float]) -> Adapter:
    """The weighted sum, as a request's `mixture` asks for it."""
    return combine(adapters, weights, Recipe(method="cat"), allow_base_mismatch=True)


def truths(base: Base, adapter: Adapter | None, count: int) -> list[Truth]:
    """The truth of each of QUESTIONS, up to `count` tokens, by transformers' `generate` in float32."""
    prompts = Prompts(base)
    rows = [_ids(prompts, question) for question in QUESTIONS]
    width = max(map(len, rows))
    ids = torch.tensor([[base.pad_id] * (width - len(row)) + row for row in rows])
    mask = torch.tensor([[0] * (width - len(row)) + [1] * len(row) for row in rows])
    greedy = GenerationConfig(
        max_new_tokens=count,
        do_sample=False,
        eos_token_id=list(base.stop_ids) or None,
        pad_token_id=base.pad_id,
        output_logits=True,
        return_dict_in_generate=True,
    )
    with torch.no_grad(), injected(base.model, adapter, "truth"):
        model: Any = base.model
        out = model.generate(input_ids=ids, attention_mask=mask, generation_config=greedy)
    logits = torch.stack(out.logits, dim=1)  # (questions, tokens, vocabulary)
    best = logits.topk(2, dim=-1).values
    apart = (best[..., 0] - best[..., 1]) / logits.abs().amax(dim=-1)
    answers = out.sequences[:, width:].tolist()
    return [
        safe_part(row, far, base.stop_ids) for row, far in zip(answers, (apart > CLOSE).tolist(), strict=True)
    ]


def _ids(prompts: Prompts, question: Question) -> list[int]:
    given = question.given
    return prompts.chat([], given["messages"]) if "messages" in given else prompts.text([], given["prompt"])


def safe_part(tokens: Sequence[int], far: Sequence[bool], stops: Sequence[int]) -> Truth:
    """The tokens before the first near tie or stop."""
    end = next(
        (n for n, token in enumerate(tokens) if token in stops or not far[n]), min(len(tokens), len(far))
    )
    return Truth(tuple(tokens[:end]), end < len(tokens) and far[end] and tokens[end] in stops)
