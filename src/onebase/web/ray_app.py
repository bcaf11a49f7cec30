"""A Ray Serve application: replicas of the server behind one address, each request where its adapter is.

    serve run onebase.web.ray_app:application base=smollm2-135m adapters=./adapters replicas=2

Ray starts and watches the replicas and spreads the requests; what answers them is the same HTTP application as in
`onebase serve`. Ray's name for the rest is model multiplexing: a request for an adapter goes to a replica that has
served it before, while that one has room.
"""

from __future__ import annotations

import asyncio
import importlib
import json
from collections.abc import AsyncGenerator, AsyncIterator, MutableMapping
from dataclasses import dataclass
from typing import Any

from starlette.requests import Request
from starlette.responses import StreamingResponse

from onebase.config import build
from onebase.models.base import load_base
from onebase.options import opt, require
from onebase.serve.request import Limits
from onebase.web.http import create_app
from onebase.web.server import one_heap, open_service, settle
from onebase.web.settings import Settings

WARM = 64  # adapters of a replica that Ray remembers; how many are in memory, the engine decides
AHEAD = 2  # requests that a replica may have, for each of its slots: those that run, and as many that wait
IGNORED = {
    "host",
    "content-length",
    "transfer-encoding",
    "connection",
}  # of an answer: Ray's own server says them


@dataclass(frozen=True)
class RayConfig:
    """What `serve run` takes after the application's name, as NAME=VALUE."""

    base: str = opt("smollm2-135m", "base model")
    adapters: str = opt("", "folder of adapter folders, the same for all replicas (empty: the base alone)")
    replicas: int = opt(2, "engines, each with a base of its own in memory")
    slots: int = opt(Limits.slots, "requests that run at once in a replica")
    context: int = opt(Limits.context, "tokens of prompt and answer (0: what the base takes)")
    memory: float = opt(0.0, "GB of a replica for cached keys and values and for adapters (0: no limit)")
    api_key: str = opt("", "key that every request must bring (empty: none; then only localhost is answered)")
    dtype: str = opt("auto", "the base's dtype")

    def __post_init__(self) -> None:
        require("replicas", self.replicas, self.replicas >= 1, "at least 1")
        require("memory", self.memory, self.memory >= 0, "0 or more")

    @property
    def limits(self) -> Limits:
        """Of one replica's engine."""
        return Limits(self.slots, self.context, round(self.memory * 1e9))


def application(options: dict[str, str]) -> Any:
    """The application, for `serve run` or `ray.serve.run`. Raises ConfigError."""
    config = build(RayConfig, options)
    serve = importlib.import_module("ray.serve")
    remembered = serve.multiplexed(max_num_models_per_replica=WARM)
    kind = type("Engine", (Replica,), {"has": remembered(Replica.has)})
    engines = serve.deployment(
        kind, num_replicas=config.replicas, max_ongoing_requests=AHEAD * config.limits.slots
    )
    door = serve.deployment(
        Door, ray_actor_options={"num_cpus": 0}, max_ongoing_requests=AHEAD * Limits.queue * config.replicas
    )
    return door.bind(engines.bind(config))


class Replica:
    """One engine in a process of its own."""

    def __init__(self, config: RayConfig) -> None:
        # Loading at run time stays off: it would reach one replica of several. What appears in the folder reaches all.
        settings = Settings(api_key=config.api_key)
        one_heap()
        base = load_base(config.base, config.dtype)
        self._service = open_service(base, config.adapters or None, config.limits, settings)
        self._app: Any = create_app(self._service)
        settle()
        self._looking: asyncio.Task[None] | None = None

    async def has(self, adapter: str) -> str:
        """Called, tells Ray that this replica has the adapter; the engine reads it when it is first needed."""
        return adapter

    async def answer(
        self, scope: dict[str, Any], body: bytes, model: str
    ) -> AsyncGenerator[tuple[int, list[tuple[str, str]]] | bytes]:
        """(status, headers), and then the pieces of the answer as they come."""
        self._looking = self._looking or asyncio.create_task(self._service.keep_looking())
        if model in self._service.names():
            await self.has(model)
        async for message in _asked(self._app, scope, body):
            if message["type"] == "http.response.start":
                headers = [
                    (name.decode("latin-1"), value.decode("latin-1")) for name, value in message["headers"]
                ]
                yield message["status"], headers
            elif message.get("body"):
                yield message["body"]

    async def check_health(self) -> None:
        """Raise where the engine's thread has ended, so that Ray starts another replica."""
        if not self._service.worker.alive:
            raise RuntimeError("the engine does not run")


class Door:
    """Takes the requests in, and reads which model each is for."""

    def __init__(self, engines: Any) -> None:
        self._engines = engines.options(stream=True)

    async def __call__(self, request: Request) -> StreamingResponse:
        """One request."""
        body = await request.body()
        names = ("type", "http_version", "method", "scheme", "path", "raw_path", "query_string", "headers")
        scope = {name: request.scope[name] for name in names if name in request.scope}
        scope |= {"root_path": "", "client": None, "server": None}
        model = _model(body)
        engine = self._engines.options(multiplexed_model_id=model) if model else self._engines
        parts: AsyncIterator[Any] = engine.answer.remote(scope, body, model)
        status, headers = await anext(parts)
        shown = {name: value for name, value in headers if name.lower() not in IGNORED}
        return StreamingResponse(parts, status, shown)


def _model(body: bytes) -> str:
    """The model that a body names, empty where it names none; what is wrong with it, the replica says."""
    try:
        asked = json.loads(body)
    except ValueError:
        return ""
    model = asked.get("model") if isinstance(asked, dict) else None
    return model if isinstance(model, str) else ""


async def _asked(app: Any, scope: dict[str, Any], body: bytes) -> AsyncGenerator[MutableMapping[str, Any]]:
    """What an ASGI application sends for a request. Closed early, it sees that the client left."""
    sent: asyncio.Queue[MutableMapping[str, Any] | None] = asyncio.Queue()
    received = [{"type": "http.request", "body": body, "more_body": False}]
    left = asyncio.Event()

    async def receive() -> MutableMapping[str, Any]:
        if not received:
            await left.wait()
        return received.pop() if received else {"type": "http.disconnect"}

    task = asyncio.create_task(app(scope, receive, sent.put))
    task.add_done_callback(lambda _: sent.put_nowait(None))
    try:
        while (message := await sent.get()) is not None:
            yield message
        await task
    finally:
        left.set()
        task.cancel()
