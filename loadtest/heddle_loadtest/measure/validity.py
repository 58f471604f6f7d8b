"""Whether a run's figures are the target's, or the client's own, and whether they may be published."""

from __future__ import annotations

from collections.abc import Iterable, Sequence

from heddle_loadtest.measure.distribution import Distribution
from heddle_loadtest.measure.repeat import has_closed_loop
from heddle_loadtest.run.outcome import Outcome
from heddle_loadtest.workload.spec import Workload

MAX_LAG_P99_SECONDS = 0.005
MAX_CPU_SHARE = 0.9
MIN_REPEATS = 3


def invalid_reasons(workload: Workload, outcomes: Sequence[Outcome]) -> tuple[str, ...]:
    """A sentence for each thing that makes the figures worthless; none if they are good."""
    if not any(result.is_ok for outcome in outcomes for result in outcome.results):
        return ("Not one request succeeded.",)
    is_closed = has_closed_loop(workload)
    return tuple(
        sentence
        for number, outcome in enumerate(outcomes)
        for sentence in _client_reasons(outcome, f"In repeat {number} the", is_closed)
    )


def unpublishable_reasons(outcomes: Sequence[Outcome], invalid: Sequence[str]) -> tuple[str, ...]:
    """The reasons against validity, and those that only forbid to publish."""
    reasons = list(invalid)
    if len(outcomes) < MIN_REPEATS:
        reasons.append(f"A published figure needs {MIN_REPEATS} repeats, and this run has {len(outcomes)}.")
    if any(outcome.was_interrupted for outcome in outcomes):
        reasons.append("The run was interrupted before its end.")
    return tuple(reasons)


def _client_reasons(outcome: Outcome, subject: str, is_closed: bool) -> Iterable[str]:
    limit_ms = MAX_LAG_P99_SECONDS * 1000
    if (lag_ms := _p99_ms(result.lag_seconds for result in outcome.results)) > limit_ms:
        yield f"{subject} client sent its requests late: dispatch lag p99 {lag_ms:.1f} ms, over {limit_ms:g} ms."
    if (cpu_share := outcome.health.cpu_share) > MAX_CPU_SHARE:
        yield f"{subject} client was short of CPU: {cpu_share:.2f} of a core, over {MAX_CPU_SHARE:g}."
    # A closed loop sends whenever it wakes up, so that its lag shows in the event loop alone.
    if is_closed and (loop_lag_ms := _p99_ms(outcome.health.loop_lag_seconds)) > limit_ms:
        yield f"{subject} client's event loop woke late: loop lag p99 {loop_lag_ms:.1f} ms, over {limit_ms:g} ms."


def _p99_ms(seconds: Iterable[float]) -> float:
    values = Distribution.of(seconds)
    return values.p99 * 1000 if values is not None else 0.0
