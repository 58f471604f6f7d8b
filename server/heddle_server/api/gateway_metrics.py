"""The gauges that inference gateways route by, under the names they read: the model server protocol's.

A gateway splits the lists of adapters at "," without trimming, takes the newest of several series, and compares the
entries with the `model` of the request it routes. So there is one series, without blanks, and adapters are called as
clients call them.
"""

from __future__ import annotations

import heapq
import time
from collections import Counter
from collections.abc import Callable, Iterable, Iterator
from typing import Protocol

from prometheus_client.core import GaugeMetricFamily, Metric
from prometheus_client.registry import Collector

from heddle_adapters.store_index import AdapterRecord
from heddle_server.api.engine_metrics import EngineView
from heddle_server.messages import EngineStats

MAX_LISTED = 200


class NameView(Protocol):
    """What adapters are called."""

    def list(self) -> tuple[AdapterRecord, ...]: ...

    def names_of(self, digest: str) -> tuple[str, ...]: ...


class WaitingAdapters:
    """What requests without a first token asked for."""

    def __init__(self) -> None:
        self._counts: Counter[str] = Counter()

    def add(self, references: Iterable[str]) -> None:
        self._counts.update(references)

    def remove(self, references: Iterable[str]) -> None:
        self._counts.subtract(references)
        self._counts += Counter()  # drops what is zero

    def __iter__(self) -> Iterator[str]:
        return iter(self._counts)


class GatewayCollector(Collector):
    """Gauges of the engine and of which adapters a request would find on the device."""

    def __init__(
        self, engine: EngineView, names: NameView, waiting: WaitingAdapters, num_uses: Callable[[str], int]
    ) -> None:
        self._engine = engine
        self._names = names
        self._waiting = waiting
        self._num_uses = num_uses

    def collect(self) -> Iterator[Metric]:
        stats = self._engine.stats
        if stats is None:
            return
        yield GaugeMetricFamily("vllm:num_requests_running", "Requests in the running batch.", stats.num_running)
        yield GaugeMetricFamily("vllm:num_requests_waiting", "Requests queued in the engine.", stats.num_waiting)
        yield GaugeMetricFamily("vllm:kv_cache_usage_perc", "Share of the KV pages in use, 0 to 1.", kv_usage(stats))
        running = self._resident()
        waiting = sorted(set(self._waiting) - set(running))[:MAX_LISTED]
        info = GaugeMetricFamily(
            "vllm:lora_requests_info",
            "Adapters on the device and adapters waited for; the value is the time in Unix seconds.",
            labels=["max_lora", "running_lora_adapters", "waiting_lora_adapters"],
        )
        max_adapters = len(running) + room_for_adapters(stats)
        info.add_metric([str(max_adapters), ",".join(running), ",".join(waiting)], time.time())
        yield info

    def _resident(self) -> list[str]:
        """The most used of the adapters on the device: by name where it is what the name means, else by version.

        Those of other owners than the local one are called `owner:name`, so that no two are one to a gateway.
        """
        digests = self._engine.resident_digests()
        latest = [record for record in self._names.list() if record.latest.digest in digests]
        older = digests - {record.latest.digest for record in latest}
        references = [record.latest.full_name for record in latest]
        references += [reference for digest in older for reference in self._names.names_of(digest)]
        return sorted(heapq.nlargest(MAX_LISTED, references, key=self._num_uses))


def kv_usage(stats: EngineStats) -> float:
    """Of the pages that no adapter holds, the share that running requests need."""
    num_pages = stats.num_kv_pages + stats.num_cached_pages + stats.num_free_pages
    return stats.num_kv_pages / num_pages if num_pages else 1.0


def room_for_adapters(stats: EngineStats) -> int:
    """How many more adapters of the resident ones' mean size would fit without another one leaving."""
    mean_pages = max(1.0, stats.num_adapter_pages / max(1, stats.num_resident_adapters))
    return int((stats.num_free_pages + stats.num_cached_pages) / mean_pages)
