"""What the server counts, for Prometheus. Decides nothing."""

from __future__ import annotations

from collections.abc import Callable, Iterator

from prometheus_client import CollectorRegistry, Counter, Histogram, generate_latest
from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, Metric
from prometheus_client.registry import Collector

from heddle_server.messages import EngineStats

_TTFT_BUCKETS = (0.001, 0.005, 0.01, 0.02, 0.04, 0.06, 0.08, 0.1, 0.25, 0.5, 0.75, 1, 2.5, 5, 7.5, 10, 20, 40)
_TOKEN_BUCKETS = (0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.075, 0.1, 0.15, 0.2, 0.3, 0.4, 0.5, 0.75, 1, 2.5)
_REQUEST_BUCKETS = (0.01, 0.02, 0.04, 0.08, 0.16, 0.32, 0.64, 1.28, 2.56, 5.12, 10.24, 20.48, 40.96, 81.92)


class Metrics:
    """One server's metrics, in a registry of their own."""

    def __init__(self) -> None:
        self.registry = CollectorRegistry()
        registry = self.registry
        self._requests = Counter(
            "heddle_requests", "Requests answered, by how they ended.", ["outcome"], registry=registry
        )
        self._errors = Counter("heddle_errors", "Error replies, by code.", ["code"], registry=registry)
        self._prompt_tokens = Counter("heddle_prompt_tokens", "Prompt tokens of ended requests.", registry=registry)
        self._generated_tokens = Counter(
            "heddle_generated_tokens", "Tokens generated for ended requests.", registry=registry
        )
        self.time_to_first_token = Histogram(
            "heddle_time_to_first_token_seconds",
            "From admission to the first token.",
            buckets=_TTFT_BUCKETS,
            registry=registry,
        )
        self.inter_token_latency = Histogram(
            "heddle_inter_token_latency_seconds",
            "Between tokens of one answer.",
            buckets=_TOKEN_BUCKETS,
            registry=registry,
        )
        self._request_seconds = Histogram(
            "heddle_request_seconds", "From admission to the end.", buckets=_REQUEST_BUCKETS, registry=registry
        )

    def count_request(self, outcome: str, num_prompt_tokens: int, num_generated_tokens: int, seconds: float) -> None:
        """One admitted request has ended: stop, length, error or disconnect."""
        self._requests.labels(outcome).inc()
        self._prompt_tokens.inc(num_prompt_tokens)
        self._generated_tokens.inc(num_generated_tokens)
        self._request_seconds.observe(seconds)

    def count_error(self, code: str) -> None:
        """One request was answered with an error envelope."""
        self._errors.labels(code).inc()

    def watch(self, stats: Callable[[], EngineStats | None], is_ready: Callable[[], bool]) -> None:
        """Adds the engine's own numbers, read at every scrape."""
        self.registry.register(_EngineCollector(stats, is_ready))

    def text(self) -> bytes:
        """The Prometheus text format."""
        return generate_latest(self.registry)


class _EngineCollector(Collector):
    def __init__(self, stats: Callable[[], EngineStats | None], is_ready: Callable[[], bool]) -> None:
        self._stats = stats
        self._is_ready = is_ready

    def collect(self) -> Iterator[Metric]:
        yield GaugeMetricFamily("heddle_ready", "1 when the engine can take requests.", float(self._is_ready()))
        stats = self._stats()
        if stats is None:
            return
        yield GaugeMetricFamily("heddle_requests_running", "Requests in the running batch.", stats.num_running)
        yield GaugeMetricFamily("heddle_requests_waiting", "Requests queued in the engine.", stats.num_waiting)
        yield GaugeMetricFamily("heddle_adapters_resident", "Adapters on the device.", stats.num_resident_adapters)
        yield _pages(stats)
        yield CounterMetricFamily("heddle_engine_steps", "Steps the engine has done.", stats.num_steps)
        yield CounterMetricFamily("heddle_preemptions", "Requests put back for want of pages.", stats.num_preemptions)
        yield CounterMetricFamily("heddle_adapter_loads", "Adapters brought to the device.", stats.num_adapter_loads)
        yield CounterMetricFamily("heddle_adapter_evictions", "Adapters dropped from it.", stats.num_adapter_evictions)
        yield CounterMetricFamily(
            "heddle_prefix_cache_queries", "Prompt tokens looked up in the prefix cache.", stats.num_prefix_queries
        )
        yield CounterMetricFamily("heddle_prefix_cache_hits", "Of those, found.", stats.num_prefix_hits)


def _pages(stats: EngineStats) -> Metric:
    pages = GaugeMetricFamily("heddle_pool_pages", "Pages of the pool, by what they hold.", labels=["kind"])
    kinds = {
        "free": stats.num_free_pages,
        "kv": stats.num_kv_pages,
        "cached": stats.num_cached_pages,
        "adapter": stats.num_adapter_pages,
    }
    for kind, count in kinds.items():
        pages.add_metric([kind], count)
    return pages
