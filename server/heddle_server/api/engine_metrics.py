"""The engine's own numbers for Prometheus, read at every scrape."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Protocol

from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, Metric
from prometheus_client.registry import Collector

from heddle_server.messages import EngineStats, ModelCard


class EngineView(Protocol):
    """What is known of the engine in this process."""

    @property
    def is_ready(self) -> bool: ...

    @property
    def model(self) -> ModelCard | None: ...

    @property
    def stats(self) -> EngineStats | None: ...

    def resident_digests(self) -> frozenset[str]: ...


def packing_waste(stats: EngineStats, model: ModelCard) -> float:
    """Share of the adapters' pages that holds nothing."""
    held_bytes = stats.num_adapter_pages * model.page_bytes
    return 1 - stats.adapter_used_bytes / held_bytes if held_bytes else 0.0


def pages_by_kind(stats: EngineStats) -> dict[str, int]:
    """What the pool's pages hold; together they are the pool."""
    return {
        "free": stats.num_free_pages,
        "kv": stats.num_kv_pages,
        "cached": stats.num_cached_pages,
        "adapter": stats.num_adapter_pages,
        "loading": stats.num_loading_pages,
    }


def requests_by_tier(stats: EngineStats) -> dict[str, int]:
    """Where requests found their adapters; the disk is a miss."""
    return {"device": stats.num_device_hits, "host": stats.num_host_hits, "disk": stats.num_misses}


class EngineCollector(Collector):
    """Counters begin anew when the engine is restarted, as Prometheus expects of a restart."""

    def __init__(self, engine: EngineView) -> None:
        self._engine = engine

    def collect(self) -> Iterator[Metric]:
        yield GaugeMetricFamily("heddle_ready", "1 when the engine can take requests.", float(self._engine.is_ready))
        stats, model = self._engine.stats, self._engine.model
        if stats is None or model is None:
            return
        yield from _requests(stats)
        yield from _adapters(stats)
        yield from _pool(stats, model)


def _requests(stats: EngineStats) -> Iterator[Metric]:
    yield GaugeMetricFamily("heddle_requests_running", "Requests in the running batch.", stats.num_running)
    yield GaugeMetricFamily("heddle_requests_waiting", "Requests queued in the engine.", stats.num_waiting)
    yield CounterMetricFamily("heddle_engine_steps", "Steps the engine has done.", stats.num_steps)
    yield CounterMetricFamily("heddle_step_seconds", "Time spent in steps that computed something.", stats.step_seconds)
    yield CounterMetricFamily(
        "heddle_step_host_seconds", "Of that, outside forwards and sampling: planning, tensors.", stats.host_seconds
    )
    yield CounterMetricFamily(
        "heddle_computed_tokens", "Tokens computed, of prompts and answers.", stats.num_computed_tokens
    )
    yield CounterMetricFamily(
        "heddle_segments", "Runs of tokens with one adapter, summed over all steps.", stats.num_segments
    )
    yield CounterMetricFamily("heddle_preemptions", "Requests put back for want of pages.", stats.num_preemptions)


def _adapters(stats: EngineStats) -> Iterator[Metric]:
    yield _by_label(
        GaugeMetricFamily("heddle_adapters_resident", "Adapters that a memory tier holds.", labels=["tier"]),
        {"device": stats.num_resident_adapters, "host": stats.num_host_adapters},
    )
    yield _by_label(
        CounterMetricFamily(
            "heddle_adapter_cache_requests",
            "Requests by where their adapter was when they came; disk is a miss.",
            labels=["tier"],
        ),
        requests_by_tier(stats),
    )
    yield CounterMetricFamily("heddle_adapter_loads", "Adapters copied to the device.", stats.num_adapter_loads)
    yield _by_label(
        CounterMetricFamily("heddle_adapter_evictions", "Adapters dropped from a memory tier.", labels=["tier"]),
        {"device": stats.num_adapter_evictions, "host": stats.num_host_evictions},
    )
    yield GaugeMetricFamily("heddle_host_cache_bytes", "Held by adapters in host memory.", stats.host_bytes)
    yield GaugeMetricFamily("heddle_host_cache_budget_bytes", "What they may hold.", stats.host_budget_bytes)


def _pool(stats: EngineStats, model: ModelCard) -> Iterator[Metric]:
    yield _by_label(
        GaugeMetricFamily("heddle_pool_pages", "Pages of the pool, by what they hold.", labels=["kind"]),
        pages_by_kind(stats),
    )
    yield GaugeMetricFamily(
        "heddle_pool_pinned_pages",
        "Of the adapters' pages, those that stay by an operator's wish.",
        stats.num_pinned_pages,
    )
    yield GaugeMetricFamily(
        "heddle_pool_packing_waste_ratio",
        "Share of the adapters' pages that holds nothing.",
        packing_waste(stats, model),
    )
    yield CounterMetricFamily(
        "heddle_prefix_cache_queries", "Prompt tokens looked up in the prefix cache.", stats.num_prefix_queries
    )
    yield CounterMetricFamily("heddle_prefix_cache_hits", "Of those, found.", stats.num_prefix_hits)
    yield CounterMetricFamily(
        "heddle_prefix_cache_evictions", "Cached pages given up for other things.", stats.num_prefix_evictions
    )


def _by_label(family: GaugeMetricFamily | CounterMetricFamily, values: Mapping[str, float]) -> Metric:
    for value, count in values.items():
        family.add_metric([value], count)
    return family
