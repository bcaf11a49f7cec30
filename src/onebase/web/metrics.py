"""Counters and histograms for Prometheus: requests and their latencies as clients see them, and the engine's stats."""

from __future__ import annotations

import threading
import time
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any

from prometheus_client import CollectorRegistry, Counter, Histogram, generate_latest
from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, Metric
from prometheus_client.registry import Collector

from onebase.serve.request import Event, Stats

MOST_LABELS = 100  # adapters that are counted by name; the others share one label
MOST_REASONS = 50  # refused adapters that are told
LONGEST_REASON = 200  # characters
OTHERS, MIXTURE = "(others)", "(mixture)"  # an adapter of such a name would only be counted with them
SECONDS = (0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10, 30, 60, 120, 300)
TOKEN_SECONDS = (0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1, 2.5)

# Engine stats: metric -> (what it says, the stat, whether it only grows).
STATS: dict[str, tuple[str, str, bool]] = {
    "onebase_requests_waiting": ("requests in the queue", "waiting", False),
    "onebase_requests_running": ("requests in a slot", "running", False),
    "onebase_kv_bytes": ("memory of the slots' keys and values", "kv_bytes", False),
    "onebase_adapter_bytes": ("memory of the adapters", "adapter_bytes", False),
    "onebase_prompt_tokens": ("prompt tokens of started requests", "prompt_tokens", True),
    "onebase_prompt_tokens_reused": ("prompt tokens that were in the cache", "reused_tokens", True),
    "onebase_generated_tokens": ("tokens that were generated", "new_tokens", True),
    "onebase_adapter_loads": ("adapters read from disk for a request", "adapter_loads", True),
    "onebase_adapter_hits": ("adapters that were in memory when needed", "adapter_hits", True),
}


@dataclass(frozen=True, eq=False)
class Snapshot(Collector):
    """What the engine and the pool say at one moment."""

    stats: Stats
    adapters: int
    refused: Mapping[str, str]

    def collect(self) -> Iterable[Metric]:
        """The metrics, for a registry of their own."""
        for name, (text, stat, grows) in STATS.items():
            family = CounterMetricFamily if grows else GaugeMetricFamily
            yield family(name, text, value=float(getattr(self.stats, stat)))
        yield GaugeMetricFamily("onebase_adapters", "adapters that can be asked for", value=self.adapters)
        yield GaugeMetricFamily("onebase_adapters_refused", "adapters that cannot", value=len(self.refused))
        reasons = GaugeMetricFamily("onebase_adapter_refused", "why", labels=["adapter", "reason"])
        for name, reason in list(self.refused.items())[:MOST_REASONS]:
            reasons.add_metric([_clean(name), _clean(reason)[:LONGEST_REASON]], 1)
        yield reasons


class Metrics:
    """What happened since the start. Its methods may be called from any thread."""

    def __init__(self) -> None:
        self._registry = CollectorRegistry()
        self._lock = threading.Lock()
        self._labels: set[str] = set()
        take: dict[str, Any] = {"registry": self._registry}
        self.requests = Counter("onebase_requests", "requests that ended", ["model", "finish"], **take)
        self.errors = Counter("onebase_http_errors", "answers that were errors", ["status"], **take)
        self.first = Histogram("onebase_first_token_seconds", "to the first token", buckets=SECONDS, **take)
        self.gap = Histogram("onebase_token_seconds", "between tokens", buckets=TOKEN_SECONDS, **take)
        self.whole = Histogram("onebase_request_seconds", "to the end", buckets=SECONDS, **take)

    def label(self, model: str) -> str:
        """A model's label: its name, while there are few; only names that are served may be asked for."""
        with self._lock:
            if len(self._labels) < MOST_LABELS:
                self._labels.add(model)
            return _clean(model) if model in self._labels else OTHERS

    def render(self, snapshot: Snapshot) -> bytes:
        """Everything, in Prometheus' text form."""
        now = CollectorRegistry()
        now.register(snapshot)
        return generate_latest(self._registry) + generate_latest(now)


class Watch:
    """Times one request."""

    def __init__(self, metrics: Metrics, model: str) -> None:
        self._metrics, self._label = metrics, metrics.label(model)
        self._start = self._last = time.monotonic()
        self._tokens = 0

    def saw(self, event: Event) -> None:
        """An event came."""
        now = time.monotonic()
        if event.tokens:
            (self._metrics.gap if self._tokens else self._metrics.first).observe(now - self._last)
            self._tokens, self._last = self._tokens + len(event.tokens), now
        if event.finish is not None:
            self._metrics.whole.observe(now - self._start)
            self._metrics.requests.labels(self._label, event.finish).inc()


def _clean(text: str) -> str:
    """Without half characters, such as a file name may hold."""
    return text.encode("utf-8", "replace").decode()
