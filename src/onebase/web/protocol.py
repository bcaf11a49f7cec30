"""The bodies that clients send, in OpenAI's and vLLM's words; what they may not ask is refused by name."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Annotated, Any, Literal, NamedTuple

from pydantic import AfterValidator, BaseModel, ConfigDict, Field

from onebase.errors import nearest
from onebase.serve.request import MOST_LOGPROBS, Request
from onebase.web.problems import Problem

MOST_MIXED = 8  # adapters in a mixture
MOST_PROMPTS = 128  # prompts of one request
COMPLETION_TOKENS = 16  # OpenAI's default for completions; a chat may fill the context

# Parameters that change no answer here.
HARMLESS = frozenset(
    """user metadata store service_tier safety_identifier prompt_cache_key prompt_cache_retention
    parallel_tool_calls prompt_cache_options request_id priority""".split()
)
# Parameters that would change it, with the values that ask for nothing; null always does.
UNSUPPORTED: dict[str, tuple[Any, ...]] = {
    "n": (1,),
    "best_of": (1,),
    "echo": (False,),
    "suffix": ("",),
    "frequency_penalty": (0,),
    "presence_penalty": (0,),
    "repetition_penalty": (1,),
    "min_p": (0,),
    "min_tokens": (0,),
    "ignore_eos": (False,),
    "stop_token_ids": ([],),
    "logit_bias": ({},),
    "response_format": ({"type": "text"},),
    "tools": ([],),
    "tool_choice": ("none", "auto"),
    "functions": ([],),
    "function_call": ("none", "auto"),
    "modalities": (["text"],),
    "audio": (),
    "prediction": (),
    "reasoning_effort": (),
    "verbosity": (),
    "web_search_options": (),
}


def _whole(text: str) -> str:
    """JSON can spell half of a character, which no tokenizer reads."""
    try:
        text.encode()
    except UnicodeEncodeError as error:
        raise ValueError("it holds half of a character, a surrogate") from error
    return text


Words = Annotated[str, AfterValidator(_whole)]
StopText = Annotated[Words, Field(min_length=1, max_length=256)]
Weight = Annotated[float, Field(allow_inf_nan=False)]


class StreamOptions(BaseModel):
    """What a stream holds besides the answer."""

    model_config = ConfigDict(strict=True)

    include_usage: bool | None = None


class Asked(BaseModel):
    """What completions and chats have in common. Null stands for the default."""

    model_config = ConfigDict(strict=True, extra="allow")

    model: Words = Field(description="the base's name, or an adapter's")
    mixture: dict[Words, Weight] | None = Field(
        None,
        min_length=1,
        max_length=MOST_MIXED,
        description="adapters with weights; `model` is the base then",
    )
    max_tokens: int | None = Field(None, ge=1)
    temperature: float | None = Field(None, ge=0, allow_inf_nan=False)
    top_p: float | None = Field(None, gt=0, le=1)
    top_k: int | None = Field(None, ge=-1, description="0 and -1: all tokens")
    seed: int | None = None
    stop: StopText | list[StopText] | None = Field(None, max_length=256)
    stream: bool | None = None
    stream_options: StreamOptions | None = None

    @property
    def most(self) -> int | None:
        """The longest answer in tokens, None for what the context leaves."""
        return self.max_tokens

    @property
    def shown(self) -> int | None:
        """The likeliest tokens to report, None for no log-probabilities."""
        return None

    @property
    def with_usage(self) -> bool:
        """Whether the stream ends with a count of tokens."""
        return bool(self.stream_options and self.stream_options.include_usage)

    def check(self) -> None:
        """Raise Problem for a parameter that would have to be ignored."""
        for name, value in (self.model_extra or {}).items():
            if name in UNSUPPORTED:
                _require_neutral(name, value)
            elif name not in HARMLESS:
                known = nearest(name, [*type(self).model_fields, *UNSUPPORTED])
                near = f"; nearest valid: {', '.join(known)}" if known else ""
                raise Problem(400, f"unknown parameter {name!r}{near}", param=name, code="unknown_parameter")
        if self.stream_options and not self.stream:
            raise Problem(400, "stream_options needs stream: true", param="stream_options")

    def request(self, name: str, prompt: Sequence[int], chosen: Chosen, stops: frozenset[int]) -> Request:
        """What the engine is asked. Raises ConfigError."""
        stop = [self.stop] if isinstance(self.stop, str) else self.stop or []
        return Request(
            name,
            tuple(prompt),
            chosen.adapter,
            chosen.mixture,
            max_tokens=self.most or 1 << 40,
            temperature=1.0 if self.temperature is None else self.temperature,
            top_p=1.0 if self.top_p is None else self.top_p,
            top_k=max(self.top_k or 0, 0),
            seed=self.seed,
            stop=tuple(stop),
            stop_ids=stops,
            logprobs=self.shown,
        )


class Chosen(NamedTuple):
    """Who answers: an adapter, the weighted sum of several, or neither."""

    adapter: str | None = None
    mixture: tuple[tuple[str, float], ...] = ()


class CompletionBody(Asked):
    """POST /v1/completions."""

    prompt: Words | list[Words] | list[int] | list[list[int]] = Field(
        description="raw text or token ids, one prompt or several"
    )
    logprobs: int | None = Field(None, ge=0, le=MOST_LOGPROBS)

    @property
    def most(self) -> int | None:
        return self.max_tokens or COMPLETION_TOKENS

    @property
    def shown(self) -> int | None:
        return self.logprobs

    def prompts(self) -> list[str | list[int]]:
        """Each prompt by itself. Raises Problem where there is none, or too many."""
        given: Any = self.prompt
        if isinstance(given, str) or (given and isinstance(given[0], int)):
            given = [given]
        found: list[str | list[int]] = given
        if not 1 <= len(found) <= MOST_PROMPTS:
            raise Problem(
                400, f"prompt: {len(found)} prompts, from 1 to {MOST_PROMPTS} are taken", param="prompt"
            )
        return found


class TextPart(BaseModel):
    """A part of a message; other types than text are not understood."""

    model_config = ConfigDict(strict=True, extra="forbid")

    type: Literal["text"]
    text: Words


class ChatMessage(BaseModel):
    """One message. `name` is taken and not shown to the model."""

    model_config = ConfigDict(strict=True, extra="forbid")

    role: Literal["system", "developer", "user", "assistant"]
    content: Words | list[TextPart]
    name: str | None = None
    refusal: None = None
    tool_calls: None = None
    function_call: None = None
    audio: None = None

    def plain(self) -> dict[str, str]:
        """As chat templates take it."""
        parts = self.content
        return {
            "role": self.role,
            "content": parts if isinstance(parts, str) else "".join(part.text for part in parts),
        }


class ChatBody(Asked):
    """POST /v1/chat/completions."""

    messages: list[ChatMessage] = Field(min_length=1)
    max_completion_tokens: int | None = Field(None, ge=1)
    logprobs: bool | None = None
    top_logprobs: int | None = Field(None, ge=0, le=MOST_LOGPROBS)

    @property
    def most(self) -> int | None:
        return self.max_completion_tokens or self.max_tokens

    @property
    def shown(self) -> int | None:
        return (self.top_logprobs or 0) if self.logprobs else None

    def check(self) -> None:
        super().check()
        if self.top_logprobs and not self.logprobs:
            raise Problem(400, "top_logprobs needs logprobs: true", param="top_logprobs")
        if self.messages[-1].role == "assistant":
            raise Problem(400, "messages: the last one is the assistant's own", param="messages")


class LoadBody(BaseModel):
    """POST /v1/load_lora_adapter, vLLM's."""

    model_config = ConfigDict(strict=True)

    lora_name: Words = Field(description="the name that requests will ask for")
    lora_path: Words = Field(description="its folder, inside the adapters folder")
    load_inplace: bool = Field(False, description="replace an adapter of that name")


class UnloadBody(BaseModel):
    """POST /v1/unload_lora_adapter, vLLM's."""

    model_config = ConfigDict(strict=True)

    lora_name: Words
    lora_int_id: int | None = Field(None, description="taken for vLLM's sake; the name says which")


def _require_neutral(name: str, value: Any) -> None:
    neutral = UNSUPPORTED[name]
    if value is None or any(
        value == one and isinstance(value, bool) == isinstance(one, bool) for one in neutral
    ):
        return
    only = f"; it can be left out{f' or {neutral[0]!r}' if neutral else ''}"
    raise Problem(400, f"{name}: not supported{only}", param=name, code="unsupported_parameter")


def explain(errors: Sequence[Mapping[str, Any]]) -> Problem:
    """What pydantic found wrong in a body, as one problem about the first field."""
    where = [str(part) for part in errors[0]["loc"] if part not in ("body", "path", "query")]
    if errors[0]["type"] == "json_invalid":
        return Problem(400, f"the body is not JSON: {errors[0].get('ctx', {}).get('error', '')}")
    param = where[0] if where else None
    same = [one for one in errors if param is None or param in map(str, one["loc"])]
    said = " or ".join(dict.fromkeys(str(one["msg"]) for one in same[:3]))
    hint = "" if param else " (is the Content-Type application/json?)"
    return Problem(400, f"{param or 'the body'}: {said}{hint}", param=param)
