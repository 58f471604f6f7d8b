"""What the server counts, for Prometheus. Decides nothing."""

from __future__ import annotations

from collections import Counter as Counts
from collections.abc import Iterator, Sequence

from prometheus_client import CollectorRegistry, Counter, Histogram, generate_latest
from prometheus_client.core import GaugeMetricFamily, Metric
from prometheus_client.registry import Collector

from heddle_adapters.store import AdapterStore
from heddle_adapters.tier import TIERS, AdapterMove
from heddle_server.api.adapter_counters import AdapterCounters
from heddle_server.api.engine_metrics import EngineCollector, EngineView
from heddle_server.api.gateway_metrics import GatewayCollector, WaitingAdapters
from heddle_server.messages import AdmissionReport

_TTFT_BUCKETS = (0.001, 0.005, 0.01, 0.02, 0.04, 0.06, 0.08, 0.1, 0.25, 0.5, 0.75, 1, 2.5, 5, 7.5, 10, 20, 40)
_TOKEN_BUCKETS = (0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.075, 0.1, 0.15, 0.2, 0.3, 0.4, 0.5, 0.75, 1, 2.5)
_REQUEST_BUCKETS = (0.01, 0.02, 0.04, 0.08, 0.16, 0.32, 0.64, 1.28, 2.56, 5.12, 10.24, 20.48, 40.96, 81.92)
_LOAD_BUCKETS = (0.0005, 0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10)


class Metrics:
    """One server's metrics, in a registry of their own."""

    def __init__(self) -> None:
        self.registry = CollectorRegistry()
        self.adapters = AdapterCounters()
        self.registry.register(self.adapters)
        self.waiting_adapters = WaitingAdapters()
        self._requests = self._counter("heddle_requests", "Requests answered, by how they ended.", "outcome")
        self._errors = self._counter("heddle_errors", "Error replies, by code.", "code")
        self._refused = self._counter("heddle_requests_refused", "Requests not let in, by what was short.", "reason")
        self._quarantined = self._counter("heddle_adapters_quarantined", "Adapter contents found damaged.")
        self._prompt_tokens = self._counter("heddle_prompt_tokens", "Prompt tokens of ended requests.")
        self._generated_tokens = self._counter("heddle_generated_tokens", "Tokens generated for ended requests.")
        self._load_bytes = self._counter(
            "heddle_adapter_load_bytes",
            "Adapter bytes brought nearer to the device, by their tier before.",
            "source",
        )
        self._load_seconds = self._histogram(
            "heddle_adapter_load_seconds",
            "What bringing an adapter from one tier to the next took.",
            _LOAD_BUCKETS,
            "source",
        )
        self._adapter_wait = self._histogram(
            "heddle_adapter_wait_seconds", "Of the time to the first token, until the adapter was there.", _LOAD_BUCKETS
        )
        self._time_to_first_token = self._histogram(
            "heddle_time_to_first_token_seconds", "From admission to the first token.", _TTFT_BUCKETS
        )
        self.inter_token_latency = self._histogram(
            "heddle_inter_token_latency_seconds", "Between tokens of one answer.", _TOKEN_BUCKETS
        )
        self._request_seconds = self._histogram(
            "heddle_request_seconds", "From admission to the end.", _REQUEST_BUCKETS
        )

    def count_request(
        self,
        outcome: str,
        adapter_names: Sequence[str],
        num_prompt_tokens: int,
        num_generated_tokens: int,
        seconds: float,
    ) -> None:
        """One admitted request has ended: stop, length, error or disconnect."""
        self._requests.labels(outcome).inc()
        self._prompt_tokens.inc(num_prompt_tokens)
        self._generated_tokens.inc(num_generated_tokens)
        self._request_seconds.observe(seconds)
        for name in adapter_names:
            self.adapters.count(name, outcome, num_prompt_tokens, num_generated_tokens)

    def observe_start(self, ttft_seconds: float, admission: AdmissionReport | None) -> None:
        """One request has got its first token."""
        self._time_to_first_token.observe(ttft_seconds)
        if admission is not None and admission.tier is not None:
            self._adapter_wait.observe(admission.load_seconds)

    def record_moves(self, moves: Sequence[AdapterMove]) -> None:
        """Adapters have come to a tier or left one."""
        for move in moves:
            if TIERS.index(move.target) < TIERS.index(move.source):
                self._load_seconds.labels(move.source).observe(move.seconds)
                self._load_bytes.labels(move.source).inc(move.size_bytes)

    def count_error(self, code: str) -> None:
        """One request was answered with an error envelope."""
        self._errors.labels(code).inc()

    def count_refusal(self, reason: str) -> None:
        """One request was not let in."""
        self._refused.labels(reason).inc()

    def count_quarantine(self) -> None:
        """The engine has found content damaged."""
        self._quarantined.inc()

    def watch(self, engine: EngineView, store: AdapterStore) -> None:
        """Adds what the engine and the store say of themselves at every scrape."""
        self.adapters.watch(store.__contains__)
        self.registry.register(EngineCollector(engine))
        self.registry.register(_StoreCollector(store))
        self.registry.register(GatewayCollector(engine, store, self.waiting_adapters, self.adapters.num_uses))

    def text(self) -> bytes:
        """The Prometheus text format."""
        return generate_latest(self.registry)

    def _counter(self, name: str, documentation: str, *labels: str) -> Counter:
        return Counter(name, documentation, labels, registry=self.registry)

    def _histogram(self, name: str, documentation: str, buckets: Sequence[float], *labels: str) -> Histogram:
        return Histogram(name, documentation, labels, buckets=buckets, registry=self.registry)


class _StoreCollector(Collector):
    def __init__(self, store: AdapterStore) -> None:
        self._store = store

    def collect(self) -> Iterator[Metric]:
        registered = GaugeMetricFamily(
            "heddle_adapters_registered", "Adapter names, by whether they can be used.", labels=["status"]
        )
        reasons = [self._store.quarantine_reason(record.latest.digest) for record in self._store.list()]
        counts = Counts("ready" if reason is None else "quarantined" for reason in reasons)
        for status in ("ready", "quarantined"):
            registered.add_metric([status], counts[status])
        yield registered
