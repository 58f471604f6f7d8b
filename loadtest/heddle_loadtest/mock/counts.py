"""What the fake server counts, under the names heddle's own metrics have. Decides nothing."""

from __future__ import annotations

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram, generate_latest

_TTFT_BUCKETS = (0.001, 0.005, 0.01, 0.02, 0.04, 0.06, 0.08, 0.1, 0.25, 0.5, 0.75, 1, 2.5, 5, 7.5, 10, 20, 40)
_REQUEST_BUCKETS = (0.01, 0.02, 0.04, 0.08, 0.16, 0.32, 0.64, 1.28, 2.56, 5.12, 10.24, 20.48, 40.96, 81.92)


class Counts:
    """One server's metrics, in a registry of their own; each is touched once a request, never once a token."""

    def __init__(self) -> None:
        self._registry = CollectorRegistry()
        self.requests = self._counter("heddle_requests", "Requests answered, by how they ended.", "outcome")
        self.errors = self._counter("heddle_errors", "Error replies, by code.", "code")
        self.prompt_tokens = self._counter("heddle_prompt_tokens", "Prompt tokens of ended requests.")
        self.generated_tokens = self._counter("heddle_generated_tokens", "Tokens generated for ended requests.")
        self.cache_requests = self._counter(
            "heddle_adapter_cache_requests", "Requests by where their adapter was; disk is a miss.", "tier"
        )
        self.time_to_first_token = Histogram(
            "heddle_time_to_first_token_seconds",
            "From admission to the first token.",
            buckets=_TTFT_BUCKETS,
            registry=self._registry,
        )
        self.request_seconds = Histogram(
            "heddle_request_seconds", "From admission to the end.", buckets=_REQUEST_BUCKETS, registry=self._registry
        )
        self.running = Gauge("heddle_requests_running", "Requests being computed.", registry=self._registry)

    def text(self) -> bytes:
        """The Prometheus text format."""
        return generate_latest(self._registry)

    def _counter(self, name: str, documentation: str, *labels: str) -> Counter:
        return Counter(name, documentation, labels, registry=self._registry)
