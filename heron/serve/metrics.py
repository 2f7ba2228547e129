"""What /metrics shows, in Prometheus' form."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import TYPE_CHECKING

from prometheus_client import CollectorRegistry, Counter, Histogram, generate_latest
from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, Metric
from prometheus_client.registry import Collector

if TYPE_CHECKING:
    from heron.serve.models import Models
    from heron.serve.prefix_cache import Level

CONTENT_TYPE = "text/plain; version=0.0.4; charset=utf-8"
_SECONDS = (0.01, 0.025, 0.05, 0.1, 0.15, 0.25, 0.5, 1, 2.5, 5, 10, 30, 60)


class Metrics:
    """Counters of a server, in a registry of their own."""

    def __init__(self, models: Models):
        self._registry = registry = CollectorRegistry()
        self._now = _Now(models)
        registry.register(self._now)
        self._answers = Counter(
            "heron_http_responses", "answers to HTTP requests", ["route", "status"], registry=registry
        )
        self.prompt_tokens = Counter("heron_prompt_tokens", "tokens of prompts", registry=registry)
        self.cached_tokens = Counter(
            "heron_cached_prompt_tokens", "tokens of prompts that the prefix cache had read", registry=registry
        )
        self.drawn_tokens = Counter("heron_drawn_tokens", "tokens drawn", registry=registry)
        self.first_token = Histogram(
            "heron_first_token_seconds", "from a request to its first token", buckets=_SECONDS, registry=registry
        )
        self.whole = Histogram(
            "heron_request_seconds", "from a request to its end", buckets=_SECONDS, registry=registry
        )

    def count(self, route: str, status: int) -> None:
        """Count an answer."""
        self._answers.labels(route, str(status)).inc()

    def text(self, levels: Mapping[str, Level]) -> bytes:
        """All of them, with the levels of the prefix cache by their names."""
        self._now.levels = levels
        return generate_latest(self._registry)


class _Now(Collector):
    """What each model and each level of the prefix cache is at, asked when it is shown."""

    def __init__(self, models: Models):
        self._models = models
        self.levels: Mapping[str, Level] = {}

    def collect(self) -> Iterable[Metric]:
        hits = CounterMetricFamily("heron_prefix_hits", "states found in the prefix cache", labels=["level"])
        n_bytes = GaugeMetricFamily("heron_prefix_bytes", "bytes of the states in the prefix cache", labels=["level"])
        for name, level in self.levels.items():
            hits.add_metric([name], level.hits)
            n_bytes.add_metric([name], level.n_bytes)
        yield from (hits, n_bytes)
        waiting = GaugeMetricFamily("heron_waiting_requests", "requests that wait for a place", labels=["model"])
        writing = GaugeMetricFamily("heron_open_sequences", "texts that are being written", labels=["model"])
        for name, desk in self._models.desks.items():
            waiting.add_metric([name], desk.n_waiting)
            writing.add_metric([name], desk.n_writing)
        yield from (waiting, writing)
