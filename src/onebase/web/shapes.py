"""Answers in OpenAI's shapes: completions and chats, whole and in chunks, with usage and log-probabilities."""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

from onebase.serve.request import TokenLogprob

Piece = Callable[[int], bytes]
"""What a token stands for, in UTF-8."""


class Text(NamedTuple):
    """A piece of an answer, or all of it. `offset`: characters of the answer's tokens before it."""

    number: int  # of the answer
    text: str = ""
    logprobs: Sequence[TokenLogprob] | None = None  # None where they were not asked for
    finish: str | None = None
    offset: int = 0


class Usage(NamedTuple):
    """Tokens that were read and written."""

    prompt: int
    answer: int

    def body(self) -> dict[str, int]:
        """OpenAI's usage object."""
        return {
            "prompt_tokens": self.prompt,
            "completion_tokens": self.answer,
            "total_tokens": self.prompt + self.answer,
        }


@dataclass(frozen=True)
class Completion:
    """The shape of /v1/completions."""

    piece: Piece
    prefix = "cmpl"
    kinds = ("text_completion", "text_completion")  # whole, chunk

    def opening(self, number: int) -> dict[str, Any] | None:
        """The choice of a stream's first chunk, None where there is none."""
        return None

    def whole(self, text: Text) -> dict[str, Any]:
        """A choice."""
        logprobs = None if text.logprobs is None else self._logprobs(text)
        return {"index": text.number, "text": text.text, "logprobs": logprobs, "finish_reason": text.finish}

    chunk = whole

    def _logprobs(self, text: Text) -> dict[str, Any]:
        words = [self._word(one.token) for one in text.logprobs or ()]
        offsets = [text.offset + sum(map(len, words[:n])) for n in range(len(words))]
        return {
            "tokens": words,
            "token_logprobs": [one.logprob for one in text.logprobs or ()],
            "top_logprobs": [
                {
                    self._word(token): logprob for token, logprob in reversed(one.top)
                }  # of like texts the likeliest
                for one in text.logprobs or ()
            ],
            "text_offset": offsets,
        }

    def _word(self, token: int) -> str:
        return word(self.piece(token))


@dataclass(frozen=True)
class Chat:
    """The shape of /v1/chat/completions."""

    piece: Piece
    prefix = "chatcmpl"
    kinds = ("chat.completion", "chat.completion.chunk")

    def opening(self, number: int) -> dict[str, Any] | None:
        """The choice of a stream's first chunk: who speaks."""
        return self._choice(Text(number), delta={"role": "assistant", "content": ""})

    def whole(self, text: Text) -> dict[str, Any]:
        """A choice."""
        return self._choice(text, message={"role": "assistant", "content": text.text, "refusal": None})

    def chunk(self, text: Text) -> dict[str, Any]:
        """A choice of a stream."""
        return self._choice(text, delta={"content": text.text} if text.text else {})

    def _choice(self, text: Text, **said: Any) -> dict[str, Any]:
        logprobs = None
        if text.logprobs is not None:
            shown = [
                {
                    **self._token(one.token, one.logprob),
                    "top_logprobs": [self._token(*top) for top in one.top],
                }
                for one in text.logprobs
            ]
            logprobs = {"content": shown, "refusal": None}
        return {"index": text.number, **said, "logprobs": logprobs, "finish_reason": text.finish}

    def _token(self, token: int, logprob: float) -> dict[str, Any]:
        piece = self.piece(token)
        return {"token": word(piece), "logprob": logprob, "bytes": list(piece)}


Shape = Completion | Chat


@dataclass(frozen=True)
class Envelope:
    """What every chunk of an answer says alike."""

    shape: Shape
    id: str
    created: int  # Unix time in seconds
    model: str

    def whole(self, texts: Sequence[Text], usage: Usage) -> dict[str, Any]:
        """The answer at once."""
        return self._body(0, [self.shape.whole(text) for text in texts], usage=usage.body())

    def chunk(self, choices: Sequence[dict[str, Any]], **more: Any) -> str:
        """One event of the stream."""
        return sse(self._body(1, choices, **more))

    def _body(self, kind: int, choices: Sequence[dict[str, Any]], **more: Any) -> dict[str, Any]:
        named = {
            "id": self.id,
            "object": self.shape.kinds[kind],
            "created": self.created,
            "model": self.model,
        }
        return {**named, "choices": list(choices), **more}


DONE = "data: [DONE]\n\n"


def sse(body: dict[str, Any]) -> str:
    """A server-sent event. JSON in ASCII has no line break of any kind."""
    return f"data: {json.dumps(body)}\n\n"


def word(piece: bytes) -> str:
    """A token as text; what is no whole character shows as such."""
    return piece.decode("utf-8", "replace")
