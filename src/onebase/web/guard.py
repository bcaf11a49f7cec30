"""Before a request reaches a route: who asks, by which host name, and how large its body is."""

from __future__ import annotations

import asyncio
import hmac
from collections.abc import Awaitable, Callable, MutableMapping
from typing import Any

from starlette.requests import Request

from onebase.web.problems import Problem, problem_at
from onebase.web.settings import Settings, is_loopback

Message = MutableMapping[str, Any]
Receive = Callable[[], Awaitable[Message]]
Send = Callable[[Message], Awaitable[None]]
App = Callable[[Message, Receive, Send], Awaitable[None]]
Answer = Callable[[Problem], App]

OPEN = {"/", "/health"}  # for anybody: the page holds nothing, and asks for the key itself


class Guard:
    """ASGI middleware. Bodies are read here, whole, up to the limit; what comes after it sees them as they were."""

    def __init__(self, app: App, settings: Settings, answer: Answer) -> None:
        self._app, self._settings, self._answer = app, settings, answer

    async def __call__(self, scope: Message, receive: Receive, send: Send) -> None:
        """One request, or the app's life."""
        if scope["type"] != "http":
            return await self._app(scope, receive, send)
        try:
            self._admit(Request(scope))
            async with asyncio.timeout(self._settings.body_seconds):
                body = await self._read(Request(scope), receive)
        except Problem as problem:
            return await self._answer(problem)(scope, receive, send)
        except TimeoutError:
            problem = problem_at(
                408, f"the body took longer than {self._settings.body_seconds:g} s to arrive"
            )
            return await self._answer(problem)(scope, receive, send)
        if body is not None:
            await self._app(scope, _replay(body, receive), send)

    def _admit(self, request: Request) -> None:
        key, path = self._settings.api_key, request.url.path
        if key and path not in OPEN:
            given = request.headers.get("authorization", "").encode("latin-1")
            if not hmac.compare_digest(given, f"Bearer {key}".encode()):
                said = "the API key is missing or wrong: send Authorization: Bearer KEY"
                raise problem_at(401, said, {"WWW-Authenticate": "Bearer"})
        # Without a key, a page elsewhere could have its own name lead to this machine (DNS rebinding).
        if not key and not is_loopback(_host(request.headers.get("host", ""))):
            raise problem_at(403, "without an API key only requests to localhost are answered")

    async def _read(self, request: Request, receive: Receive) -> bytes | None:
        """The body, None where the client left before its end. Raises Problem as soon as it is over the limit."""
        most, body = self._settings.max_body, bytearray()
        said = request.headers.get("content-length", "")
        while True:
            if len(body) > most or (said.isdecimal() and int(said[:20]) > most):
                found = f"the body is larger than {most} bytes"
                raise Problem(413, found, code="body_too_large", headers={"Connection": "close"})
            message = await receive()
            if message["type"] == "http.disconnect":
                return None
            body += message.get("body", b"")
            if not message.get("more_body", False) and len(body) <= most:
                return bytes(body)


def _host(header: str) -> str:
    """The Host header without its port."""
    return header if header.endswith("]") else header.rpartition(":")[0] or header


def _replay(body: bytes, receive: Receive) -> Receive:
    """A `receive` that gives the body, and then what comes: the client's leaving."""
    left = [body]

    async def replayed() -> Message:
        if left:
            return {"type": "http.request", "body": left.pop(), "more_body": False}
        return await receive()

    return replayed
