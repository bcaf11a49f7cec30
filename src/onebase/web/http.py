"""The HTTP API as a FastAPI application: OpenAI's routes, vLLM's for adapters, metrics, and the page."""

from __future__ import annotations

import asyncio
import base64
import contextlib
import hashlib
import json
import time
import uuid
from collections.abc import AsyncGenerator, AsyncIterator, Coroutine, Sequence
from pathlib import Path
from typing import Annotated, Any

from fastapi import APIRouter, Depends, FastAPI, Request
from fastapi.exceptions import RequestValidationError
from fastapi.responses import HTMLResponse, JSONResponse, PlainTextResponse, Response, StreamingResponse
from pydantic import BaseModel
from starlette.exceptions import HTTPException

from onebase.errors import OnebaseError
from onebase.serve.request import Event
from onebase.serve.request import Request as Asking
from onebase.web.answering import Answering
from onebase.web.guard import Guard
from onebase.web.problems import Problem, problem_at, problem_of
from onebase.web.protocol import Asked, ChatBody, CompletionBody, LoadBody, UnloadBody, explain
from onebase.web.service import Service, Speaker
from onebase.web.shapes import DONE, Chat, Completion, Envelope, Shape, Text, Usage, sse, word

PAGE = "page.html"
POLICY = (  # the page's own style and script alone; nothing from elsewhere, nothing to elsewhere, in nobody's frame
    "default-src 'none'; style-src {style}; script-src {script}; connect-src 'self'; img-src data:; base-uri 'none'; "
    "form-action 'none'; frame-ancestors 'none'"
)
SHUTTING_DOWN = "the server is shutting down"


class ErrorFacts(BaseModel):
    """What went wrong."""

    message: str
    type: str
    param: str | None
    code: str | int | None


class ErrorBody(BaseModel):
    """OpenAI's error object."""

    error: ErrorFacts


class Ascii(JSONResponse):
    """JSON in ASCII: a name may hold what UTF-8 has no bytes for."""

    def render(self, content: Any) -> bytes:
        """The body."""
        return json.dumps(content, allow_nan=False).encode()


class EventStream(StreamingResponse):
    """An answer as it is made. However it ends, nothing of it goes on in the engine."""

    media_type = "text/event-stream"

    def __init__(self, content: AsyncIterator[str], answering: Answering) -> None:
        super().__init__(content, headers={"Cache-Control": "no-cache", "X-Accel-Buffering": "no"})
        self._answering = answering

    async def __call__(self, scope: Any, receive: Any, send: Any) -> None:
        """Send it."""
        try:
            await super().__call__(scope, receive, send)
        finally:
            self._answering.close()


def _service(request: Request) -> Service:
    return request.app.state.service


Served = Annotated[Service, Depends(_service)]
ERRORS: dict[int | str, dict[str, Any]] = {"4XX": {"model": ErrorBody}, "5XX": {"model": ErrorBody}}
STREAM: dict[int | str, dict[str, Any]] = {200: {"content": {"text/event-stream": {}}}}
PLAIN: dict[int | str, dict[str, Any]] = {200: {"content": {"text/plain": {"schema": {"type": "string"}}}}}
router = APIRouter(responses=ERRORS, default_response_class=Ascii)


def create_app(service: Service) -> FastAPI:
    """The application around a service whose worker runs."""

    @contextlib.asynccontextmanager
    async def lifespan(_: FastAPI) -> AsyncGenerator[None]:
        looking = asyncio.create_task(service.keep_looking())
        yield
        looking.cancel()

    def answer(problem: Problem) -> Response:
        service.metrics.errors.labels(problem.status).inc()
        return Ascii(problem.body(), problem.status, dict(problem.headers))

    # FastAPI's own documentation pages load scripts from elsewhere.
    app = FastAPI(title="onebase", docs_url=None, redoc_url=None, lifespan=lifespan)
    app.state.service = service
    app.include_router(router)
    app.add_middleware(Guard, settings=service.settings, answer=answer)
    kinds: dict[type[Exception], Any] = {
        Problem: lambda error: error,
        OnebaseError: problem_of,
        RequestValidationError: lambda error: explain(error.errors()),
        HTTPException: lambda error: problem_at(error.status_code, str(error.detail), error.headers),
        Exception: lambda error: problem_at(500, "the server failed; its log says how"),
    }
    for kind, translate in kinds.items():
        app.add_exception_handler(kind, lambda _, error, translate=translate: answer(translate(error)))
    return app


@router.get("/", response_class=HTMLResponse, include_in_schema=False)
def page() -> HTMLResponse:
    """The page, to try adapters side by side."""
    text = Path(__file__).with_name(PAGE).read_text(encoding="utf-8")
    policy = POLICY.format(style=_inline(text, "style"), script=_inline(text, "script"))
    headers = {
        "Content-Security-Policy": policy,
        "X-Content-Type-Options": "nosniff",
        "Referrer-Policy": "no-referrer",
    }
    return HTMLResponse(text, headers=headers)


def _inline(text: str, tag: str) -> str:
    """What the policy calls the one element of this kind that stands in the page: the digest of its text."""
    inside = text.partition(f"<{tag}>")[2].partition(f"</{tag}>")[0]
    return f"'sha256-{base64.b64encode(hashlib.sha256(inside.encode()).digest()).decode()}'"


@router.get("/health")
def health(service: Served) -> dict[str, str]:
    """Whether requests are answered."""
    if not service.open:
        raise problem_at(503, SHUTTING_DOWN)
    if not service.worker.alive:
        raise problem_at(503, "the engine does not run")
    return {"status": "ok"}


@router.get("/metrics", response_class=PlainTextResponse)
async def metrics(service: Served) -> Response:
    """For Prometheus."""
    text = service.metrics.render(await service.snapshot())
    return Response(text, media_type="text/plain; version=0.0.4; charset=utf-8")


@router.get("/v1/models")
def models(service: Served) -> dict[str, Any]:
    """The base and the adapters, by the names that `model` takes."""
    return {"object": "list", "data": service.models()}


@router.get("/v1/models/{model:path}")
def one_model(model: str, service: Served) -> dict[str, Any]:
    """One of them."""
    for found in service.models():
        if found["id"] == model:
            return found
    raise Problem(404, f"the model {model!r} does not exist", "not_found_error", "model", "model_not_found")


@router.get("/v1/adapters")
def adapters(service: Served) -> dict[str, Any]:
    """What the adapters are, which were refused and why, and what can be loaded."""
    return service.adapters()


@router.post("/v1/load_lora_adapter", response_class=PlainTextResponse, responses=PLAIN)
async def load_lora_adapter(body: LoadBody, service: Served) -> PlainTextResponse:
    """Serve an adapter of the folder under a name, as in vLLM."""
    return PlainTextResponse(await service.load(body))


@router.post("/v1/unload_lora_adapter", response_class=PlainTextResponse, responses=PLAIN)
def unload_lora_adapter(body: UnloadBody, service: Served) -> PlainTextResponse:
    """Serve it no longer, as in vLLM."""
    return PlainTextResponse(service.unload(body))


@router.post("/v1/completions", response_model=None, responses=STREAM)
async def completions(body: CompletionBody, request: Request, service: Served) -> Response:
    """Go on with raw text."""
    body.check()
    speaker = await service.choose(body.model, body.mixture)
    origins = [one.origin for one in speaker.adapters]
    ids = [
        await asyncio.to_thread(service.prompts.text, origins, prompt) if isinstance(prompt, str) else prompt
        for prompt in body.prompts()
    ]
    shape = Completion(lambda token: service.prompts.piece(origins, token))
    return await _answer(request, body, shape, speaker, ids)


@router.post("/v1/chat/completions", response_model=None, responses=STREAM)
async def chat_completions(body: ChatBody, request: Request, service: Served) -> Response:
    """Answer a conversation, in the format that the adapter was trained with."""
    body.check()
    speaker = await service.choose(body.model, body.mixture)
    origins = [one.origin for one in speaker.adapters]
    messages = [message.plain() for message in body.messages]
    ids = await asyncio.to_thread(service.prompts.chat, origins, messages)
    shape = Chat(lambda token: service.prompts.piece(origins, token))
    return await _answer(request, body, shape, speaker, [ids])


async def _answer(
    request: Request, body: Asked, shape: Shape, speaker: Speaker, prompts: Sequence[Sequence[int]]
) -> Response:
    """The answers to the prompts, whole or as they come."""
    service = _service(request)
    name, stops = f"{shape.prefix}-{uuid.uuid4().hex}", frozenset(service.base.stop_ids)
    envelope = Envelope(shape, name, int(time.time()), body.model)
    asked = [body.request(f"{name}-{n}", ids, speaker.chosen, stops) for n, ids in enumerate(prompts)]
    answering = Answering(service.worker, asked, service.metrics, speaker.label)
    await answering.start()
    if body.stream:
        return EventStream(_stream(answering, envelope, body.with_usage), answering)
    try:
        return await _unless_left(request, _whole(answering, envelope))
    finally:
        answering.close()


async def _unless_left(request: Request, answer: Coroutine[Any, Any, Response]) -> Response:
    """The answer, or as soon as the client is gone one that nobody reads."""
    making, leaving = asyncio.create_task(answer), asyncio.create_task(_left(request))
    try:
        done, _ = await asyncio.wait({making, leaving}, return_when=asyncio.FIRST_COMPLETED)
        return making.result() if making in done else Response(status_code=499)
    finally:
        making.cancel()
        leaving.cancel()


async def _left(request: Request) -> None:
    while (await request.receive())["type"] != "http.disconnect":
        pass


async def _whole(answering: Answering, envelope: Envelope) -> Response:
    events: list[list[Event]] = [[] for _ in answering.requests]
    async for number, event in answering.parts():
        if problem := _failure(event):
            raise problem
        events[number].append(event)
    texts = [_joined(number, request, events[number]) for number, request in enumerate(answering.requests)]
    written = sum(len(event.tokens) for one in events for event in one)
    return Ascii(envelope.whole(texts, _usage(answering, written)))


def _joined(number: int, request: Asking, events: Sequence[Event]) -> Text:
    logprobs = [logprob for event in events for logprob in event.logprobs]
    text = "".join(event.text for event in events)
    return Text(number, text, None if request.logprobs is None else logprobs, events[-1].finish)


async def _stream(answering: Answering, envelope: Envelope, with_usage: bool) -> AsyncIterator[str]:
    shape, written = envelope.shape, 0
    more = {"usage": None} if with_usage else {}
    offsets = [0] * len(answering.requests)
    for number in range(len(offsets)):
        if opening := shape.opening(number):
            yield envelope.chunk([opening], **more)
    async for number, event in answering.parts():
        if problem := _failure(event):
            yield sse(problem.body()) + DONE
            return
        written += len(event.tokens)
        if not (event.text or event.logprobs or event.finish):
            continue  # half a character, or what may become a stop text
        logprobs = None if answering.requests[number].logprobs is None else event.logprobs
        text = Text(number, event.text, logprobs, event.finish, offsets[number])
        offsets[number] += sum(len(word(shape.piece(one.token))) for one in event.logprobs)
        yield envelope.chunk([shape.chunk(text)], **more)
    if with_usage:
        yield envelope.chunk([], usage=_usage(answering, written).body())
    yield DONE


def _usage(answering: Answering, written: int) -> Usage:
    return Usage(sum(len(request.prompt) for request in answering.requests), written)


def _failure(event: Event) -> Problem | None:
    """What went wrong after the request was taken."""
    if event.finish == "cancelled":  # not by the client, who would not read this
        return problem_at(503, SHUTTING_DOWN)
    if event.finish == "error":
        return problem_at(400 if event.refused else 500, event.error)
    return None
