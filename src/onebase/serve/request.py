"""What the serving engine is asked and what it answers: plain values, without torch."""

from __future__ import annotations

import math
from dataclasses import dataclass, field
from typing import NamedTuple

from onebase.errors import AdapterNameError, ConfigError, DataError, OnebaseError
from onebase.options import require

MOST_LOGPROBS = 20  # OpenAI's limit


class QueueFull(OnebaseError, RuntimeError):
    """As many requests wait as may; ask again in about this many seconds."""

    seconds: float = 1.0


class PromptTooLong(DataError):
    """A prompt leaves no room for an answer."""


class UnknownAdapter(AdapterNameError):
    """No adapter of that name is registered, or it was refused."""


class NoRoom(OnebaseError, MemoryError):
    """An adapter cannot be loaded while those in use fill the byte budget."""


@dataclass(frozen=True)
class Request:
    """One prompt, which adapter answers it, and how. Raises ConfigError where a value is out of range.

    Without adapter and mixture the plain base answers. `temperature` 0 takes the likeliest token; otherwise the
    draws depend on `seed` alone, not on what else is served (None: other draws each time).
    """

    id: str
    prompt: tuple[int, ...]  # token ids
    adapter: str | None = None
    mixture: tuple[tuple[str, float], ...] = ()  # (adapter, weight): their weighted sum
    max_tokens: int = 256
    temperature: float = 0.0
    top_p: float = 1.0
    top_k: int = 0  # 0: all
    seed: int | None = None
    stop: tuple[str, ...] = ()  # texts that end the answer, themselves left out
    stop_ids: frozenset[int] = frozenset()  # tokens that end the answer, themselves left out
    logprobs: int | None = (
        None  # the likeliest tokens to report beside each token; None: no log-probabilities
    )

    def __post_init__(self) -> None:
        require("prompt", self.prompt, len(self.prompt) > 0, "at least one token")
        require("max_tokens", self.max_tokens, self.max_tokens >= 1, "at least 1")
        warm = math.isfinite(self.temperature) and self.temperature >= 0
        require("temperature", self.temperature, warm, "a finite number, at least 0")
        require("top_p", self.top_p, 0 < self.top_p <= 1, "above 0 and at most 1")
        require("top_k", self.top_k, self.top_k >= 0, "at least 0")
        require("stop", self.stop, all(self.stop), "texts that are not empty")
        shown = self.logprobs is None or 0 <= self.logprobs <= MOST_LOGPROBS
        require("logprobs", self.logprobs, shown, f"from 0 to {MOST_LOGPROBS}")
        require("mixture", self.mixture, all(math.isfinite(w) for _, w in self.mixture), "finite weights")
        if self.mixture and self.adapter is not None:
            raise ConfigError("one request", "it names an adapter and a mixture", hint="name one of them")

    @property
    def group(self) -> str:
        """Requests of a group take turns with the other groups': the adapter, or the mixture's adapters."""
        return "+".join(f"{name}*{weight:g}" for name, weight in self.mixture) or self.adapter or ""


class TokenLogprob(NamedTuple):
    """A token's log-probability in nats, before temperature and cuts, and the likeliest tokens with theirs."""

    token: int
    logprob: float
    top: tuple[tuple[int, float], ...] = ()


class Event(NamedTuple):
    """What one step gave one request. `text` is new, and can no longer change or turn out to be a stop text."""

    request: str
    text: str = ""
    tokens: tuple[int, ...] = ()
    logprobs: tuple[TokenLogprob, ...] = ()  # one for each token where they were asked for
    finish: str | None = None  # None, "stop", "length", "cancelled" or "error"
    error: str = ""
    refused: bool = False  # the error is the request's own, such as adapters that do not go together


@dataclass(frozen=True)
class Result:
    """A whole answer."""

    request: str
    text: str
    tokens: tuple[int, ...]
    finish: str
    logprobs: tuple[TokenLogprob, ...] = ()
    error: str = ""


@dataclass(frozen=True)
class Limits:
    """What an engine may take. `kv_and_adapter_bytes` 0: no limit; `context` 0: the base's own."""

    slots: int = 16  # sequences at once
    context: int = 2048  # tokens of a sequence, prompt and answer
    kv_and_adapter_bytes: int = 0
    queue: int = 256  # requests that wait
    prefill_chunk: int = 256  # prompt tokens in one step

    def __post_init__(self) -> None:
        for name in ("slots", "context", "queue", "prefill_chunk"):
            value = getattr(self, name)
            require(name, value, value >= (0 if name == "context" else 1), "at least 1")
        require(
            "kv_and_adapter_bytes", self.kv_and_adapter_bytes, self.kv_and_adapter_bytes >= 0, "at least 0"
        )


@dataclass(frozen=True)
class Stats:
    """Where an engine stands. Counts are since its start."""

    waiting: int
    running: int
    kv_bytes: int
    adapter_bytes: int
    prompt_tokens: int = 0
    reused_tokens: int = 0  # prompt tokens whose keys and values were there already
    new_tokens: int = 0
    # Over, by adapter that can be asked for ("": the base).
    requests: dict[str, int] = field(default_factory=dict[str, int])
    adapter_loads: int = 0
    adapter_hits: int = 0  # an adapter was in memory when a request needed it
