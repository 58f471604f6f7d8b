"""What one pass over a schedule came to, as raw data. Knows no figures but how long it took."""

from __future__ import annotations

from collections.abc import Mapping

from msgspec import Struct

from heddle_loadtest.client.result import RequestResult


class Scrape(Struct, frozen=True, kw_only=True):
    """The target's /metrics at one moment."""

    at_seconds: float  # on the clock of the results
    samples: Mapping[str, float]  # 'name{label="value",…}' -> value, labels as the target orders them


class UploadResult(Struct, frozen=True, kw_only=True):
    """One adapter uploaded while the run went on."""

    adapter: str
    scheduled_seconds: float
    finished_seconds: float
    http_status: int | None
    error: str | None = None


class ClientHealth(Struct, frozen=True, kw_only=True):
    """Whether the client itself kept up."""

    cpu_share: float  # CPU seconds of this process per second of the run; near 1 it was the bottleneck
    loop_lag_seconds: tuple[float, ...]  # how late its event loop woke up, sampled through the run


class Outcome(Struct, frozen=True, kw_only=True):
    """One repeat. All times are on the clock of `time.perf_counter`."""

    seed: int
    started_at: str  # ISO 8601, UTC: what the clock on the wall said at started_seconds
    started_seconds: float  # the schedule's time 0
    ended_seconds: float  # when the last measured request had ended
    was_interrupted: bool
    results: tuple[RequestResult, ...]
    uploads: tuple[UploadResult, ...] = ()
    scrapes: tuple[Scrape, ...] = ()  # first before the first request, last after the last; empty where there are none
    health: ClientHealth

    @property
    def elapsed_seconds(self) -> float:
        """From the schedule's time 0 to the end of the last measured request."""
        return self.ended_seconds - self.started_seconds
