"""The clients: each asks, checks the answer against the truth, sometimes leaves early, and asks again."""

from __future__ import annotations

import asyncio
import json
import random
import sys
import time
from collections import Counter
from collections.abc import AsyncIterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import httpx

from benchmarks.soak.answers import QUESTIONS, SHORTEST, Answer, Truth, bare
from onebase.models.base import Base

LEAVE = 0.15  # of the requests are left before their end
STREAM = 0.5  # are streamed
RETRIES = (429, 503)  # answers that say: later
PATIENCE = 3.0  # seconds within which most who leave have left


@dataclass
class Name:
    """A model's name. What it may answer changes while adapters come, go and are replaced."""

    name: str
    every: tuple[str, ...]  # the contents that it ever has
    now: tuple[str, ...]  # the contents that it may have now
    extra: Mapping[str, Any] = field(default_factory=dict[str, Any])  # of the body
    codes: frozenset[int] = frozenset({200})  # what a request may be answered now
    changes: int = 0

    @property
    def key(self) -> str:
        """Tells the name from others, and the base alone from a mixture."""
        return " of ".join([*self.extra, self.name])

    def become(self, now: Sequence[str], *codes: int) -> None:
        """From here on these contents and statuses are right."""
        self.now, self.codes, self.changes = tuple(now), frozenset(codes), self.changes + 1


class Allowed(NamedTuple):
    """What a request may come back with: one of these answers, or one of these statuses."""

    answers: tuple[Answer, ...]
    codes: frozenset[int]


class Reply(NamedTuple):
    """What came back."""

    status: int
    text: str = ""
    tokens: int = -1
    finish: str | None = None
    first: float | None = None  # seconds to the first text
    error: str = ""
    retry_after: str | None = None


class Wrong(Exception):
    """The answer has not the form that the API promises."""


@dataclass
class Ledger:
    """What happened."""

    counts: Counter[str] = field(default_factory=Counter[str])
    by_name: Counter[str] = field(default_factory=Counter[str])  # checked answers
    faults: list[str] = field(default_factory=list[str])
    first: list[float] = field(default_factory=list[float])  # seconds, of complete answers
    whole: list[float] = field(default_factory=list[float])
    in_time: int = 0  # answers that came before the clients were told to end
    slowest: float = 0.0  # seconds of a list, the health, the metrics or the page
    quiet: bool = False  # faults are expected

    def fault(self, kind: str, said: str) -> None:
        """Something that must not happen."""
        self.counts[kind] += 1
        self.faults.append(f"{kind}: {said}")
        if not self.quiet:  # at once, for a long run may be stopped
            print(f"FAULT {self.faults[-1]}", file=sys.stderr, flush=True)


@dataclass
class Soak:
    """What all clients share."""

    base: Base
    truths: Mapping[str, Sequence[Truth]]  # by contents
    names: dict[str, Name]
    ledger: Ledger
    http: httpx.AsyncClient
    deadline: float

    def question(self, name: Name, draw: random.Random) -> tuple[int, int]:
        """(a question that has a safe answer whatever the name's contents, how many tokens to ask for)."""
        longest = [min(self.truths[one][n].longest for one in name.every) for n in range(len(QUESTIONS))]
        number = draw.choice([n for n, most in enumerate(longest) if most >= SHORTEST])
        return number, draw.randint(SHORTEST, longest[number])

    def answers(self, contents: Sequence[str], number: int, count: int) -> tuple[Answer, ...]:
        """What each of the contents answers."""
        return tuple(self.truths[one][number].answer(self.base, count) for one in contents)

    async def checked(self, name: Name, draw: random.Random, stream: bool) -> Reply | None:
        """Ask once, to the end; what is not right goes into the ledger. None where nothing came."""
        number, count = self.question(name, draw)
        question = QUESTIONS[number]
        body = {"model": name.name, "max_tokens": count, "temperature": 0, **question.given, **name.extra}
        before, now, codes = name.changes, name.now, name.codes
        start = time.monotonic()
        told = f"{name.name}, {question.route}, question {number}, {count} tokens, stream {stream}"
        try:
            async with asyncio.timeout(self.deadline):
                reply = await (streamed if stream else whole)(self.http, question.route, body)
        except TimeoutError:
            self.ledger.fault("stuck", f"{told}: nothing within {self.deadline:g} s")
            return None
        except (httpx.HTTPError, Wrong, ValueError, KeyError) as error:
            self.ledger.fault("broken", f"{told}: {type(error).__name__}: {error}")
            return None
        if name.changes != before:  # while it ran; whatever the name was in that time is right
            now, codes = name.every, codes | name.codes
        self._judge(reply, Allowed(self.answers(now, number, count), codes), told)
        if reply.status == 200:
            self.ledger.by_name[name.key] += 1
            self.ledger.whole.append(time.monotonic() - start)
            self.ledger.first += [] if reply.first is None else [reply.first]
        return reply

    def _judge(self, reply: Reply, allowed: Allowed, told: str) -> None:
        counts = self.ledger.counts
        counts[f"status {reply.status}"] += 1
        if reply.status == 429 and (reply.retry_after or "").isdecimal():
            return
        if reply.status not in allowed.codes or (reply.error and reply.status == 200):
            self.ledger.fault("status", f"{told}: {reply.status} {reply.error}")
        elif reply.status == 200:
            found = Answer(bare(reply.text), reply.tokens, reply.finish or "none")
            counts["checked"] += 1
            if found not in allowed.answers:
                self.ledger.fault("wrong", f"{told}: {found}; right would be {allowed.answers}")

    async def left(self, name: Name, draw: random.Random, stream: bool) -> None:
        """Ask, and go away before the end."""
        number, count = self.question(name, draw)
        question = QUESTIONS[number]
        body = {"model": name.name, "max_tokens": count, "temperature": 0, **question.given, **name.extra}
        try:
            async with asyncio.timeout(draw.uniform(0.0, PATIENCE)):
                if stream:
                    await streamed(self.http, question.route, body, leave=draw.randint(1, 3))
                else:
                    await whole(self.http, question.route, body)
        except TimeoutError:
            pass
        except (httpx.HTTPError, Wrong, ValueError, KeyError) as error:
            said = f"{name.name}, {question.route}, left early: {type(error).__name__}: {error}"
            self.ledger.fault("broken", said)
        self.ledger.counts["left"] += 1

    async def client(self, seed: int, until: asyncio.Event) -> None:
        """Ask again and again."""
        draw = random.Random(seed)
        while not until.is_set():
            name = self.names[draw.choice(list(self.names))]
            stream = draw.random() < STREAM
            if draw.random() < LEAVE:
                await self.left(name, draw, stream)
                continue
            reply = await self.checked(name, draw, stream)
            if reply is None or reply.status in RETRIES:
                await asyncio.sleep(draw.uniform(0.5, 1.5))


async def whole(http: httpx.AsyncClient, route: str, body: Mapping[str, Any]) -> Reply:
    """An answer in one piece."""
    answer = await http.post(route, json=body)
    if answer.status_code != 200:
        return failure(answer.status_code, answer.text, answer.headers)
    made = answer.json()
    choice = made["choices"][0]
    text = choice["message"]["content"] if "message" in choice else choice["text"]
    return Reply(200, text, made["usage"]["completion_tokens"], choice["finish_reason"])


async def streamed(
    http: httpx.AsyncClient, route: str, body: Mapping[str, Any], leave: int | None = None
) -> Reply:
    """An answer as it comes; `leave`: go away after this many pieces of text."""
    start, first, text, pieces = time.monotonic(), None, "", 0
    finish, tokens = None, -1
    asked = {**body, "stream": True, "stream_options": {"include_usage": True}}
    async with http.stream("POST", route, json=asked) as answer:
        if answer.status_code != 200:
            said = (await answer.aread()).decode(errors="replace")
            return failure(answer.status_code, said, answer.headers)
        async for event in events(answer):
            if "error" in event:
                return Reply(200, text, error=json.dumps(event["error"]))
            if event.get("usage"):
                tokens = event["usage"]["completion_tokens"]
            for choice in event["choices"]:
                finish = choice["finish_reason"] or finish
                piece = choice["delta"].get("content", "") if "delta" in choice else choice["text"]
                text += piece
                if piece and first is None:
                    first = time.monotonic() - start
                pieces += bool(piece)
            if leave is not None and pieces >= leave:
                break
    return Reply(200, text, tokens, finish, first)


async def events(answer: httpx.Response) -> AsyncIterator[Mapping[str, Any]]:
    """The stream's events. Raises Wrong where it does not end with [DONE]."""
    last = ""
    async for line in answer.aiter_lines():
        if line:
            last = line.removeprefix("data: ")
            if last != "[DONE]":
                yield json.loads(last)
    if last != "[DONE]":
        raise Wrong(f"the stream ended with {last[:200]!r}")


def failure(status: int, said: str, headers: Mapping[str, str]) -> Reply:
    """An answer that is an error: OpenAI's object. Raises Wrong where it is not."""
    try:
        error = json.loads(said)["error"]
        if not (isinstance(error["message"], str) and isinstance(error["type"], str)):
            raise Wrong(f"{status} with an error of another form: {said[:300]}")
    except (ValueError, KeyError, TypeError) as error:
        raise Wrong(f"{status} without an error object: {said[:300]}") from error
    if "Traceback" in said:
        raise Wrong(f"{status} with a traceback: {said[:300]}")
    return Reply(status, error=error["message"], retry_after=headers.get("retry-after"))
