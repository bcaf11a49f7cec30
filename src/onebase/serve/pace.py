"""How fast requests get their turn, by those that did last: what a client is told that comes when the queue is full."""

from __future__ import annotations

import time
from collections import deque
from collections.abc import Callable

LAST = 64  # starts that are remembered
LEAST, MOST = 1.0, 60.0  # seconds; OpenAI's client waits no longer than a minute


class Pace:
    """The times of the last starts, since there was last nothing to do. `clock`: seconds, from any moment on."""

    def __init__(self, clock: Callable[[], float] = time.monotonic) -> None:
        self._clock, self._starts = clock, deque[float](maxlen=LAST)

    def started(self) -> None:
        """A request got its turn."""
        self._starts.append(self._clock())

    def rested(self) -> None:
        """There is nothing to do: the time until the next start says nothing of the pace."""
        self._starts.clear()

    def seconds(self, waiting: int) -> float:
        """In how many seconds as many as wait will have had their turn, from 1 to 60.

        The time since the last start counts, so where all stands still the answer grows.
        """
        if not self._starts:
            return LEAST
        each = (self._clock() - self._starts[0]) / len(self._starts)
        return min(max(waiting * each, LEAST), MOST)
