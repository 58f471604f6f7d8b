"""How many streams one client process keeps up with: load after load on the fake server, lag by lag.

Judges the client alone; the server's own lateness stands beside, since the two share a machine.
"""

from __future__ import annotations

import asyncio
import math
from collections.abc import Callable, Sequence

from msgspec import Struct

from heddle_loadtest.client.result import RequestResult
from heddle_loadtest.client.target import Target
from heddle_loadtest.mock.core_wait import CoreWait
from heddle_loadtest.mock.phases import make_requests, poisson_times
from heddle_loadtest.mock.process import MockProcess
from heddle_loadtest.mock.selfcheck import LAG_LIMIT_SECONDS, percentile_99, read_json
from heddle_loadtest.mock.server import MODEL
from heddle_loadtest.mock.settings import MockSettings
from heddle_loadtest.run.runner import run_schedule
from heddle_loadtest.workload.schedule import Schedule

LOAD_SHARE = 0.9  # of the streams asked for, that were under way at once: chance is in the arrivals
_SETTINGS = MockSettings(itl_seconds=0.1)
_SHARES = (0.75, 0.5, 0.25)  # of the streams asked for: tried in turn to find where it still holds


class StreamsReport(Struct, frozen=True, kw_only=True):
    """One load; lags are 99th percentiles over all requests, and over all samples of the event loop."""

    num_streams: int  # asked for, on average once the first answers end
    max_in_flight: int  # seen
    num_requests: int
    num_failed: int
    lag_p99_seconds: float
    loop_lag_p99_seconds: float
    cpu_share: float  # of one core, by the client
    core_wait_share: float | None  # of the time, the client wanted a core that other work had
    mock_late_p99_seconds: float
    ttft_p50_seconds: float | None  # set to 50 ms
    tpot_p50_seconds: float | None  # set to 100 ms

    @property
    def is_ok(self) -> bool:
        """Whether the client kept up with about as many as were asked for."""
        is_load = self.max_in_flight >= LOAD_SHARE * self.num_streams
        return is_load and self.num_failed == 0 and self.lag_p99_seconds < LAG_LIMIT_SECONDS


def find_limit(
    num_streams: int, seconds: float = 30.0, on_load: Callable[[int], None] | None = None
) -> tuple[StreamsReport, ...]:
    """`num_streams` at once and, if that is too much, three quarters, half and a quarter of it, until one holds."""
    reports: list[StreamsReport] = []
    for share in (1.0, *_SHARES):
        num_tried = max(1, round(share * num_streams))
        if on_load is not None:
            on_load(num_tried)
        reports.append(run_streams(num_tried, seconds))
        if reports[-1].is_ok:
            break
    return tuple(reports)


def run_streams(num_streams: int, seconds: float = 30.0, num_tokens: int = 100) -> StreamsReport:
    """Requests arrive for `seconds`, so many that `num_streams` are in flight once the first answers end.

    That is after ten seconds with 100 tokens. By Little's law it takes `num_streams` arrivals per answer's time.
    """
    rate = num_streams / (_SETTINGS.ttft_seconds + (num_tokens - 1) * _SETTINGS.itl_seconds)
    times = poisson_times(rate, math.ceil(rate * seconds), seed=3)
    schedule = Schedule(requests=make_requests(times, num_tokens=num_tokens))
    with MockProcess(_SETTINGS) as mock:
        target = Target(url=mock.url, model=MODEL)
        with CoreWait() as core_wait:
            outcome = asyncio.run(run_schedule(schedule, target, keep_text=False))
        lateness = read_json(f"{mock.url}/mock/lateness")
    results = outcome.results
    return StreamsReport(
        num_streams=num_streams,
        max_in_flight=max_in_flight(results),
        num_requests=len(results),
        num_failed=sum(not result.is_ok for result in results),
        lag_p99_seconds=percentile_99([result.lag_seconds for result in results]) or 0.0,
        loop_lag_p99_seconds=percentile_99(outcome.health.loop_lag_seconds) or 0.0,
        cpu_share=outcome.health.cpu_share,
        core_wait_share=core_wait.share,
        mock_late_p99_seconds=lateness["p99_seconds"],
        ttft_p50_seconds=_median([result.ttft_seconds for result in results]),
        tpot_p50_seconds=_median([result.tpot_seconds for result in results]),
    )


def max_in_flight(results: Sequence[RequestResult]) -> int:
    """The most requests that were under way at one moment."""
    starts = [(result.started_seconds, 1) for result in results]
    num_now = num_most = 0
    for _, change in sorted(starts + [(result.finished_seconds, -1) for result in results]):
        num_now += change
        num_most = max(num_most, num_now)
    return num_most


def _median(values: Sequence[float | None]) -> float | None:
    known = sorted(value for value in values if value is not None)
    return known[len(known) // 2] if known else None
