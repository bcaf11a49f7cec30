"""From a base and a folder of adapters to a process that answers HTTP, and ends in order."""

from __future__ import annotations

import asyncio
import contextlib
import ctypes
import gc
import logging
import math
import signal
import socket
from pathlib import Path
from types import FrameType

import uvicorn

from onebase.errors import ConfigError
from onebase.models.base import Base
from onebase.serve.engine import Engine
from onebase.serve.pool import AdapterPool
from onebase.serve.proof import AUTO
from onebase.serve.request import Limits
from onebase.serve.worker import Worker
from onebase.web.http import create_app
from onebase.web.service import Service
from onebase.web.settings import Settings

LAST_SECONDS = 10.0  # for the engine's thread, once nobody waits for an answer
M_ARENA_MAX = -8  # in glibc's malloc.h
logger = logging.getLogger("onebase")


def one_heap() -> None:
    """Let all threads share one heap where the C library is glibc; called before they start.

    Adapters are read by whichever thread is free. In a heap for each thread their megabytes leave holes that no other
    thread fills: a server under load grew by 10 MB a minute (benchmarks/serve_soak.py).
    """
    with contextlib.suppress(OSError, TypeError, AttributeError):  # another system, or another C library
        ctypes.CDLL(None).mallopt(M_ARENA_MAX, 1)


def bound(settings: Settings) -> socket.socket:
    """A socket at the address; nobody is answered before `serve` listens. Raises ConfigError where it is not free."""
    try:
        family, kind, protocol, _, address = socket.getaddrinfo(
            settings.host, settings.port, type=socket.SOCK_STREAM
        )[0]
        made = socket.socket(family, kind, protocol)
        made.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            made.bind(address)
        except OSError:
            made.close()
            raise
    except (OSError, UnicodeError) as error:
        raise ConfigError(f"listen at {settings.host} port {settings.port}", str(error)) from error
    return made


def open_service(
    base: Base, adapters: str | Path | None, limits: Limits, settings: Settings, weights: str = AUTO
) -> Service:
    """A service with its engine's thread at work; `weights` as Engine takes it.

    Raises what AdapterPool, Engine and Service raise.
    """
    if settings.allow_runtime_loading and adapters is None:
        raise ConfigError("option allow_runtime_loading", "there is no adapters folder to load from")
    service = Service(Worker(Engine(base, AdapterPool(base, adapters), limits, weights)), settings)
    service.worker.start()
    return service


def settle() -> None:
    """Take all that is there now, for good as a server's base is, out of the garbage collector's sight.

    The objects of a few dozen loaded adapters call for a full collection. Over torch, transformers and a base it takes
    0.2 s, in which nobody gets a token.
    """
    gc.collect()
    gc.freeze()


def serve(service: Service, listener: socket.socket) -> None:
    """Answer until SIGTERM or SIGINT; then finish what runs, for as long as the settings say, and return."""
    settle()
    for name, reason in service.refused().items():
        logger.warning("adapter %r is refused: %s", name, reason)
    if service.engine.slow:
        logger.warning("through the model's own forward, more slowly: %s", service.engine.slow)
    listener.listen()  # whoever reads the line below may connect, and waits until uvicorn answers
    host, port = listener.getsockname()[:2]
    shown = f"[{host}]" if ":" in host else host
    logger.info("serving %s and %d adapters at http://%s:%d", service.name, len(service.names()), shown, port)
    Server(service).run(sockets=[listener])


class Server(uvicorn.Server):
    """uvicorn's server around a service; a signal ends it in order and is not raised again."""

    def __init__(self, service: Service) -> None:
        super().__init__(
            uvicorn.Config(
                create_app(service),
                http="h11",
                ws="none",
                lifespan="on",
                log_config=None,
                log_level="warning",
                access_log=False,
                server_header=False,
                proxy_headers=False,
                timeout_graceful_shutdown=math.ceil(service.settings.drain + LAST_SECONDS),
            )
        )
        self._service = service

    def run(self, sockets: list[socket.socket] | None = None) -> None:
        """Answer until `stop`; the engine's thread ends too."""
        try:
            super().run(sockets)
        finally:
            self._service.open = False
            if not self._service.worker.shutdown(drain=False, timeout=LAST_SECONDS):
                logger.warning("the engine did not end within %g s", LAST_SECONDS)

    async def shutdown(self, sockets: list[socket.socket] | None = None) -> None:
        """Wait for the answers that run; those that take too long end with an error."""
        loop, worker = asyncio.get_running_loop(), self._service.worker
        cut = loop.call_later(
            self._service.settings.drain, lambda: loop.run_in_executor(None, worker.shutdown, False)
        )
        try:
            await super().shutdown(sockets)
        finally:
            cut.cancel()

    def handle_exit(self, sig: int, frame: FrameType | None) -> None:
        """The first signal drains; a second SIGINT does not wait."""
        self.force_exit = self.should_exit and sig == signal.SIGINT
        self.stop()

    def stop(self) -> None:
        """Take nothing new, finish what runs."""
        self.should_exit, self._service.open = True, False
