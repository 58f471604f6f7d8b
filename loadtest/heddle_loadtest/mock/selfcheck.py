"""Whether the load generator measures what the fake server does: each figure against the value that was set.

Corrects nothing. What the client and the loopback add to a time is part of its error and must stay below the limits.
"""

from __future__ import annotations

import asyncio
import json
import urllib.request
from collections import Counter
from collections.abc import Callable, Collection, Iterator, Sequence
from statistics import fmean, median
from typing import Any

import msgspec
from msgspec import Struct

from heddle_loadtest.client.result import RequestResult
from heddle_loadtest.client.target import Target
from heddle_loadtest.mock.core_wait import CoreWait
from heddle_loadtest.mock.phases import Phase, selfcheck_phases
from heddle_loadtest.mock.process import MockProcess
from heddle_loadtest.mock.server import MODEL
from heddle_loadtest.mock.settings import MockSettings
from heddle_loadtest.run.outcome import Outcome
from heddle_loadtest.run.runner import run_schedule

TTFT_LIMIT_SECONDS = 0.005
TPOT_LIMIT_SHARE = 0.05
LAG_LIMIT_SECONDS = 0.005
_BROKEN_CODES = {"connection_lost", "stream_interrupted"}  # what a connection that is closed half way may show as
_COLD = {"host", "disk"}  # tiers from which an adapter is loaded
_MAX_REPEATED_PHASES = 1


class Check(Struct, frozen=True, kw_only=True):
    """One figure, what it should be, and by how much it may differ; times in seconds."""

    phase: str
    quantity: str
    wanted: float
    measured: float | None  # None: there was nothing to measure
    allowed: float = 0.0  # 0 for what is counted

    @property
    def is_ok(self) -> bool:
        """Whether it is near enough."""
        return self.measured is not None and abs(self.measured - self.wanted) <= self.allowed


class PhaseReport(Struct, frozen=True, kw_only=True):
    """One phase, run once."""

    checks: tuple[Check, ...]
    mock_late_p99_seconds: float  # how late the server itself was, which no client can help
    core_wait_share: float | None = None  # of the run's time, the client wanted a core that other work had
    was_repeated: bool = False  # because the machine was too slow the first time

    @property
    def is_ok(self) -> bool:
        """Whether all of its checks hold."""
        return all(check.is_ok for check in self.checks)

    @property
    def is_merely_slow(self) -> bool:
        """Whether only times are off, as on a machine that is busy with other work."""
        return not self.is_ok and all(check.is_ok or check.allowed > 0 for check in self.checks)


def run_selfcheck(
    phases: Sequence[Phase] | None = None,
    *,
    set_up: Callable[[MockSettings], MockSettings] = lambda settings: settings,
    on_phase: Callable[[str], None] | None = None,
) -> tuple[PhaseReport, ...]:
    """Each phase against a mock of its own; one that is merely slow may be repeated, once in all.

    `set_up` makes the settings that a mock really gets from those that are expected of it: the way to see the check
    fail. `on_phase` gets each phase's name when it starts.
    """
    reports: list[PhaseReport] = []
    for phase in phases or selfcheck_phases():
        if on_phase is not None:
            on_phase(phase.name)
        report = run_phase(phase, set_up(phase.settings))
        if report.is_merely_slow and sum(each.was_repeated for each in reports) < _MAX_REPEATED_PHASES:
            report = msgspec.structs.replace(run_phase(phase, set_up(phase.settings)), was_repeated=True)
        reports.append(report)
    return tuple(reports)


def run_phase(phase: Phase, settings: MockSettings) -> PhaseReport:
    """`phase` against a mock that is set to `settings`."""
    with MockProcess(settings) as mock:
        with CoreWait() as core_wait:
            outcome = asyncio.run(run_schedule(phase.schedule, Target(url=mock.url, model=MODEL)))
        lateness = read_json(f"{mock.url}/mock/lateness")
    checks = (*_check_times(phase, outcome), *_check_counts(phase, outcome), *_check_metrics(phase, outcome))
    late_seconds = lateness["p99_seconds"]
    return PhaseReport(checks=checks, mock_late_p99_seconds=late_seconds, core_wait_share=core_wait.share)


def read_json(url: str) -> Any:
    """What the mock says of itself."""
    with urllib.request.urlopen(url, timeout=10) as response:
        return json.load(response)


def percentile_99(values: Collection[float]) -> float | None:
    """The value that at most one in a hundred exceeds."""
    return sorted(values)[max(0, -(-len(values) * 99 // 100) - 1)] if values else None


def _check_times(phase: Phase, outcome: Outcome) -> Iterator[Check]:
    good = [result for result in outcome.results if result.is_ok]
    cold = [result for result in good if result.id in phase.cold_ids]
    warm = [result for result in good if result.id not in phase.cold_ids]
    settings = phase.settings
    yield from _check_ttft(phase, "TTFT", warm, settings.ttft_seconds)
    if phase.cold_ids:
        yield from _check_ttft(phase, "cold TTFT", cold, settings.ttft_seconds + settings.load_seconds)
        yield _load_check(phase, warm, cold)
    times_per_token = [result.tpot_seconds for result in good if result.tpot_seconds is not None]
    allowed = TPOT_LIMIT_SHARE * settings.itl_seconds
    for name, statistic in _STATISTICS.items():
        measured = statistic(times_per_token) if times_per_token else None
        yield _check(phase, f"TPOT {name}", settings.itl_seconds, measured, allowed)
    lag_seconds = percentile_99([result.lag_seconds for result in outcome.results])
    yield _check(phase, "dispatch lag p99", 0.0, lag_seconds, LAG_LIMIT_SECONDS)


def _check_ttft(phase: Phase, quantity: str, results: Sequence[RequestResult], wanted: float) -> Iterator[Check]:
    times = _ttfts(results)
    for name, statistic in _STATISTICS.items():
        measured = statistic(times) if times else None
        yield _check(phase, f"{quantity} {name}", wanted, measured, TTFT_LIMIT_SECONDS)


def _load_check(phase: Phase, warm: Sequence[RequestResult], cold: Sequence[RequestResult]) -> Check:
    difference = fmean(_ttfts(cold)) - fmean(_ttfts(warm)) if _ttfts(cold) and _ttfts(warm) else None
    return _check(phase, "cold TTFT - warm TTFT", phase.settings.load_seconds, difference, TTFT_LIMIT_SECONDS)


def _check_counts(phase: Phase, outcome: Outcome) -> Iterator[Check]:
    """What the client saw against what the settings' seed decides."""
    codes = Counter(result.error.code for result in outcome.results if result.error is not None)
    num_refused, num_broken = phase.count_faults()
    yield _check(phase, "requests", phase.num_requests, len(outcome.results))
    yield _check(phase, "refused", num_refused, codes.pop("overloaded", 0))
    yield _check(phase, "broken off", num_broken, sum(codes.pop(code, 0) for code in _BROKEN_CODES))
    yield _check(phase, "other errors", 0, codes.total())
    num_cold = sum(result.server is not None and result.server.cache in _COLD for result in outcome.results)
    yield _check(phase, "cold by the replies", len(phase.cold_ids), num_cold)


def _check_metrics(phase: Phase, outcome: Outcome) -> Iterator[Check]:
    """What the client saw against what the server counted meanwhile."""
    good = [result for result in outcome.results if result.is_ok]
    num_refused = sum(result.error is not None and result.error.code == "overloaded" for result in outcome.results)
    yield _check(phase, "/metrics answers", len(good), _increase(outcome, 'heddle_requests_total{outcome="length"}'))
    yield _check(phase, "/metrics refused", num_refused, _increase(outcome, 'heddle_errors_total{code="overloaded"}'))
    num_broken = len(outcome.results) - len(good) - num_refused
    yield _check(phase, "/metrics broken off", num_broken, _increase(outcome, 'heddle_requests_total{outcome="error"}'))
    if phase.settings.break_rate == 0:  # of an answer that breaks off, a client may miss the last token
        num_tokens = sum(result.num_output_tokens for result in good)
        yield _check(phase, "/metrics tokens", num_tokens, _increase(outcome, "heddle_generated_tokens_total"))
        name = "heddle_time_to_first_token_seconds"
        total, count = _increase(outcome, f"{name}_sum"), _increase(outcome, f"{name}_count")
        mean = fmean(_ttfts(good)) if _ttfts(good) else 0.0
        yield _check(phase, "/metrics TTFT mean", mean, total / count if count else None, TTFT_LIMIT_SECONDS)


def _increase(outcome: Outcome, series: str) -> float:
    """From the first scrape to the last; a series that is not there is at 0."""
    if not outcome.scrapes:
        return 0.0
    first, last = outcome.scrapes[0], outcome.scrapes[-1]
    return last.samples.get(series, 0.0) - first.samples.get(series, 0.0)


def _ttfts(results: Sequence[RequestResult]) -> list[float]:
    return [result.ttft_seconds for result in results if result.ttft_seconds is not None]


def _check(phase: Phase, quantity: str, wanted: float, measured: float | None, allowed: float = 0.0) -> Check:
    return Check(phase=phase.name, quantity=quantity, wanted=wanted, measured=measured, allowed=allowed)


_STATISTICS: dict[str, Callable[[Sequence[float]], float]] = {"p50": median, "mean": fmean}
