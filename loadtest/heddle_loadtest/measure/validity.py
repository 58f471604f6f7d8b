"""Whether a run's figures are the target's, or the client's own, and whether they may be published."""

from __future__ import annotations

from collections.abc import Iterable, Sequence

from heddle_loadtest.client.result import CLIENT_LIMIT
from heddle_loadtest.measure.distribution import Distribution
from heddle_loadtest.run.outcome import Outcome

MAX_LAG_P99_SECONDS = 0.005
MAX_CPU_SHARE = 0.9
MIN_REPEATS = 3


def invalid_reasons(outcomes: Sequence[Outcome]) -> tuple[str, ...]:
    """A sentence for each thing that makes the figures worthless; none if they are good."""
    is_empty = not any(result.is_ok for outcome in outcomes for result in outcome.results)
    return (*(["Not one request succeeded."] if is_empty else []), *client_reasons(outcomes))


def client_reasons(outcomes: Sequence[Outcome]) -> tuple[str, ...]:
    """A sentence for each way in which the client itself was the bottleneck; none if it kept up."""
    return tuple(
        sentence
        for number, outcome in enumerate(outcomes)
        for sentence in _client_reasons(outcome, f"In repeat {number} the")
    )


def unpublishable_reasons(outcomes: Sequence[Outcome], invalid: Sequence[str]) -> tuple[str, ...]:
    """The reasons against validity, and those that only forbid to publish."""
    reasons = list(invalid)
    if len(outcomes) < MIN_REPEATS:
        reasons.append(f"A published figure needs {MIN_REPEATS} repeats, and this run has {len(outcomes)}.")
    if any(outcome.was_interrupted for outcome in outcomes):
        reasons.append("The run was interrupted before its end.")
    return tuple(reasons)


def _client_reasons(outcome: Outcome, subject: str) -> Iterable[str]:
    limit_ms = MAX_LAG_P99_SECONDS * 1000
    if (lag_ms := _p99_ms(result.lag_seconds for result in outcome.results)) > limit_ms:
        yield f"{subject} client sent its requests late: dispatch lag p99 {lag_ms:.1f} ms, over {limit_ms:g} ms."
    if (cpu_share := outcome.health.cpu_share) > MAX_CPU_SHARE:
        yield f"{subject} client was short of CPU: {cpu_share:.2f} of a core, over {MAX_CPU_SHARE:g}."
    # A loop that wakes late reads answers late, and that shows in no dispatch lag.
    if (loop_lag_ms := _p99_ms(outcome.health.loop_lag_seconds)) > limit_ms:
        yield f"{subject} client's event loop woke late: loop lag p99 {loop_lag_ms:.1f} ms, over {limit_ms:g} ms."
    codes = [result.error.code for result in outcome.results if result.error is not None]
    if num_refused := codes.count(CLIENT_LIMIT):
        yield (
            f"{subject} client had no file descriptor or port left for {num_refused:,} of its requests: "
            "raise `ulimit -n`."
        )


def _p99_ms(seconds: Iterable[float]) -> float:
    values = Distribution.of(seconds)
    return values.p99 * 1000 if values is not None else 0.0
