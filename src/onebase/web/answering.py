"""Requests at work: the events of several, as they come, into one asyncio loop; who leaves early cancels them."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Callable, Sequence
from typing import NamedTuple

from onebase.serve.request import Event, Request
from onebase.serve.worker import Worker
from onebase.web.metrics import Metrics, Watch


class Part(NamedTuple):
    """An event of one of the requests."""

    number: int  # the request's
    event: Event


class Answering:
    """The answers to some requests, for one loop. After `start`, `parts` gives their events; `close` always."""

    def __init__(self, worker: Worker, requests: Sequence[Request], metrics: Metrics, label: str) -> None:
        self.requests = requests
        self._worker = worker
        self._open = {number: Watch(metrics, label) for number in range(len(requests))}
        self._events: asyncio.Queue[Part] = asyncio.Queue()

    async def start(self) -> None:
        """Let them wait for their turns. Raises as `Worker.submit` and its future do; then none is at work."""
        loop = asyncio.get_running_loop()
        try:
            futures = [
                self._worker.submit(request, self._listener(number, loop))
                for number, request in enumerate(self.requests)
            ]
            done = await asyncio.gather(*map(asyncio.wrap_future, futures), return_exceptions=True)
            for error in done:
                if isinstance(error, BaseException):
                    raise error
        except BaseException:
            self._abandon()
            raise

    def _listener(self, number: int, loop: asyncio.AbstractEventLoop) -> Callable[[Event], None]:
        def tell(event: Event) -> None:
            loop.call_soon_threadsafe(self._events.put_nowait, Part(number, event))

        return tell

    async def parts(self) -> AsyncIterator[Part]:
        """Every event, each request's in order."""
        while self._open:
            part = await self._events.get()
            self._open[part.number].saw(part.event)
            if part.event.finish is not None:
                del self._open[part.number]
            yield part

    def close(self) -> None:
        """Cancel those that are not over."""
        for watch in self._open.values():
            watch.saw(Event("", finish="cancelled"))
        self._abandon()

    def _abandon(self) -> None:
        for number in self._open:
            self._worker.cancel(self.requests[number].id)
        self._open.clear()
