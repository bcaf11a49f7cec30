"""A thread that steps the engine; requests and cancellations reach it from any thread or event loop."""

from __future__ import annotations

import asyncio
import logging
import queue
import threading
from collections.abc import AsyncIterator, Callable
from concurrent.futures import Future
from typing import Any

from onebase.errors import OnebaseError
from onebase.serve.engine import Engine
from onebase.serve.request import Event, Request, Stats

Listener = Callable[[Event], None]
logger = logging.getLogger("onebase")


class ShuttingDown(OnebaseError, RuntimeError):
    """The server takes no more requests."""


class Worker:
    """Owns an engine. Between two steps its thread does what was asked of it; `start` begins, `shutdown` ends it."""

    def __init__(self, engine: Engine) -> None:
        self.engine = engine
        self._inbox: queue.SimpleQueue[Callable[[], None] | None] = queue.SimpleQueue()
        self._listeners: dict[str, Listener] = {}
        self._open = True
        self._lock = threading.Lock()
        self._thread = threading.Thread(target=self._run, name="onebase-engine", daemon=True)

    def start(self) -> Worker:
        """Begin to step."""
        self._thread.start()
        return self

    @property
    def alive(self) -> bool:
        """Whether the thread steps, or waits for something to do."""
        return self._thread.is_alive()

    def submit(self, request: Request, listener: Listener) -> Future[None]:
        """Add a request; `listener` gets its events in the engine's thread, and must be quick.

        The future is done once the request waits; it raises what `Engine.add_request` raises. Raises ShuttingDown.
        """

        def add() -> None:
            self.engine.add_request(request)
            self._listeners[request.id] = listener

        return self._ask(add)

    def cancel(self, request: str) -> None:
        """End a request; its listener gets the last event. Nothing where it is over."""
        self._inbox.put(lambda: self.engine.cancel(request))

    def stats(self) -> Future[Stats]:
        """Where the engine stands, after the step that runs now."""
        return self._ask(self.engine.stats)

    async def events(self, request: Request) -> AsyncIterator[Event]:
        """A request's events as they come; closed early, it is cancelled. Raises as `submit` and its future do."""
        loop, events = asyncio.get_running_loop(), asyncio.Queue[Event]()

        def tell(event: Event) -> None:
            loop.call_soon_threadsafe(events.put_nowait, event)

        finished = False
        try:
            await asyncio.wrap_future(self.submit(request, tell))
            while not finished:
                event = await events.get()
                finished = event.finish is not None
                yield event
        finally:
            if not finished:
                self.cancel(request.id)

    def shutdown(self, drain: bool = True, timeout: float | None = None) -> bool:
        """Take no more requests, finish (or without `drain` cancel) those there are, end the thread.

        False where that took longer than `timeout` seconds.
        """
        with self._lock:
            self._open = False
        if not drain:
            self._inbox.put(self._cancel_all)
        self._inbox.put(None)
        self._thread.join(timeout)
        return not self._thread.is_alive()

    def _cancel_all(self) -> None:
        for name in self._listeners:
            self.engine.cancel(name)

    def _ask(self, do: Callable[[], Any]) -> Future[Any]:
        future: Future[Any] = Future()

        def answer() -> None:
            if not future.set_running_or_notify_cancel():
                return
            try:
                future.set_result(do())
            except Exception as error:  # it belongs to who asked, not to this thread
                future.set_exception(error)

        with self._lock:
            if not self._open:
                raise ShuttingDown("the server", "it is shutting down")
            self._inbox.put(answer)
        return future

    def _run(self) -> None:
        ending = False
        while not (ending and not self.engine.has_work):
            try:
                while (asked := self._inbox.get(block=not self.engine.has_work)) is not None:
                    asked()
                ending = True
            except queue.Empty:
                pass
            if not self.engine.has_work:
                continue
            try:
                events = self.engine.step()
            except Exception as error:  # one step's failure must not end the service
                logger.exception("a step of the engine failed")
                events = self.engine.fail_all(f"{type(error).__name__}: {error}")
            for event in events:
                self._tell(event)

    def _tell(self, event: Event) -> None:
        listener = self._listeners.get(event.request)
        if event.finish is not None:
            self._listeners.pop(event.request, None)
        try:
            if listener is not None:
                listener(event)
        except Exception:  # a listener whose loop is closed; the others go on
            logger.exception("a listener of request %s failed", event.request)
            self.engine.cancel(event.request)
