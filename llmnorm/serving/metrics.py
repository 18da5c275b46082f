"""What Prometheus reads at /metrics, by the names of vLLM and llama.cpp where they have them.

    metrics = Metrics()
    metrics.watch(service)          the engine's own counters are read when somebody asks
    metrics.text()                  -> bytes in Prometheus' text format

Each app has a registry of its own. The engine's thread counts for itself (`Engine.counters`), so
that a round pays nothing for being watched.
"""

from collections.abc import Iterator
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from llmnorm.serving.service import Service

PREFIX = "llmnorm_"
CONTENT_TYPE = "text/plain; version=0.0.4; charset=utf-8"
# Seconds: from a step of a small model to a long answer of a large one.
SHORT = (0.001, 0.002, 0.005, 0.01, 0.02, 0.05, 0.1, 0.2, 0.5, 1, 2, 5)
LONG = (0.01, 0.02, 0.05, 0.1, 0.2, 0.5, 1, 2, 5, 10, 20, 50, 100, 200, 500)


class Metrics:
    """The metrics of one app; `service.Watcher`.

    Attributes:
        lost_lines: lines of the access log that could not be written.
    """

    def __init__(self) -> None:
        from prometheus_client import CollectorRegistry, Counter, Histogram

        self._registry = CollectorRegistry()

        def seconds(name: str, about: str, buckets: tuple[float, ...]) -> Histogram:
            name = f"{PREFIX}{name}_seconds"
            return Histogram(name, about, registry=self._registry, buckets=buckets)

        def counter(name: str, about: str, *labels: str) -> Counter:
            return Counter(PREFIX + name, about, labels, registry=self._registry)

        self._queue = seconds("queue_time", "from a request to the engine's first work on it", LONG)
        self._first = seconds("time_to_first_token", "from a request to its first tokens", LONG)
        self._between = seconds(
            "inter_token_latency", "between an answer's tokens: a round by its tokens", SHORT
        )
        self._whole = seconds("e2e_request_latency", "from a request to an answer's end", LONG)
        self._finished = counter("requests", "answers, by how they ended", "finish_reason")
        self._aborted = counter("aborted", "answers that nobody waited for any more")
        self._http = counter("http_requests", "requests, by route and status", "route", "code")
        self.lost_lines = counter("access_log_errors", "lines that could not be written")

    def began(self, seconds: float) -> None:
        """A request has waited so long for a slot."""
        self._queue.observe(seconds)

    def first(self, seconds: float) -> None:
        """A request's first tokens came so long after it."""
        self._first.observe(seconds)

    def between(self, seconds: float, tokens: int) -> None:
        """An answer's next tokens came so long after those before."""
        for _ in range(tokens):
            self._between.observe(seconds / tokens)

    def finished(self, reason: str, seconds: float) -> None:
        """An answer has ended, so long after its request."""
        if reason == "abort":
            self._aborted.inc()
        self._finished.labels(reason).inc()
        self._whole.observe(seconds)

    def answered(self, route: str, code: int) -> None:
        """A request was answered; `route` is the pattern, not what the client asked for."""
        self._http.labels(route, str(code)).inc()

    def watch(self, service: "Service") -> None:
        """Tell what an engine has counted, whenever somebody asks."""
        self._registry.register(_Engine(service))  # type: ignore[arg-type]

    def text(self) -> bytes:
        """All of it, in Prometheus' text format."""
        from prometheus_client import generate_latest

        return generate_latest(self._registry)


class _Engine:
    """The engine's own numbers; `collect` is what prometheus-client calls."""

    def __init__(self, service: "Service") -> None:
        self._service = service

    def collect(self) -> Iterator[Any]:
        """Yield the metrics."""
        from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily

        engine, counters = self._service.engine, self._service.engine.counters

        def gauge(name: str, about: str, value: float) -> Any:
            return GaugeMetricFamily(PREFIX + name, about, value=value)

        def counter(name: str, about: str, value: float) -> Any:
            return CounterMetricFamily(PREFIX + name, about, value=value)

        yield gauge("requests_running", "rows that run", engine.running)
        yield gauge("requests_waiting", "rows that wait for a slot", engine.waiting)
        yield gauge("kv_cache_usage_ratio", "of the cache's tokens, those of rows", engine.usage)
        yield gauge("slots", "rows that may run at once", self._service.slots)
        yield counter("prompt_tokens", "of prompts", counters.prompt_tokens)
        yield counter("cached_prompt_tokens", "of them, saved", counters.cached_tokens)
        yield counter("prefix_lost", "beginnings that could not be reused", engine.prefix_lost)
        yield counter("generation_tokens", "generated", counters.tokens)
        yield counter("rounds", "passes of the model over rows that run", counters.rounds)
        yield counter("round_rows", "rows in all of these passes", counters.rows)
        drafted, accepted = list(counters.drafted), list(counters.accepted)
        name = "spec_decode_num"
        # Each proposal has a first token.
        yield counter(f"{name}_drafts", "proposals of the draft", (drafted or [0])[0])
        yield counter(f"{name}_draft_tokens", "tokens in them", sum(drafted))
        yield counter(f"{name}_accepted_tokens", "of them, accepted", sum(accepted))
        places = CounterMetricFamily(
            f"{PREFIX}{name}_accepted_tokens_per_pos",
            "accepted, by the place in the proposal",
            labels=["position"],
        )
        for place, count in enumerate(accepted):
            places.add_metric([str(place)], count)
        yield places
