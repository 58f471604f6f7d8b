"""The few numbers of one repeat that are worth seeing beside the next one's. Pools nothing."""

from __future__ import annotations

from dataclasses import asdict, dataclass

from heddle_loadtest.measure.ending import Ending, ending_of
from heddle_loadtest.run.outcome import Outcome
from heddle_loadtest.workload.spec import Closed, Workload


@dataclass(frozen=True, slots=True, kw_only=True)
class RepeatNumbers:
    """One repeat. Rates and tokens are those of the requests that succeeded."""

    seed: int
    started_at: str  # ISO 8601, UTC
    elapsed_seconds: float  # from the schedule's time 0 to the end of the last request
    was_interrupted: bool
    num_ok: int
    num_failed: int
    num_abandoned: int
    offered_requests_per_second: float | None  # as scheduled; None with a closed loop or fewer than two requests
    requests_per_second: float
    output_tokens_per_second: float
    client_cpu_share: float

    def to_json(self) -> dict[str, object]:
        """The fields by name."""
        values = asdict(self)
        return {name: round(value, 6) if isinstance(value, float) else value for name, value in values.items()}


def repeat_numbers(workload: Workload, outcome: Outcome) -> RepeatNumbers:
    """The numbers of one repeat."""
    endings = [ending_of(result) for result in outcome.results]
    num_ok = endings.count(Ending.OK)
    num_tokens = sum(result.num_output_tokens for result in outcome.results if result.is_ok)
    return RepeatNumbers(
        seed=outcome.seed,
        started_at=outcome.started_at,
        elapsed_seconds=outcome.elapsed_seconds,
        was_interrupted=outcome.was_interrupted,
        num_ok=num_ok,
        num_failed=endings.count(Ending.FAILED),
        num_abandoned=endings.count(Ending.ABANDONED),
        offered_requests_per_second=None if has_closed_loop(workload) else _offered_requests_per_second(outcome),
        requests_per_second=num_ok / outcome.elapsed_seconds if outcome.elapsed_seconds > 0 else 0.0,
        output_tokens_per_second=num_tokens / outcome.elapsed_seconds if outcome.elapsed_seconds > 0 else 0.0,
        client_cpu_share=outcome.health.cpu_share,
    )


def has_closed_loop(workload: Workload) -> bool:
    """Whether any of its requests wait for the answer to another one."""
    all_arrivals = [tenant.arrivals or workload.arrivals for tenant in workload.tenants.values()]
    return any(isinstance(arrivals, Closed) for arrivals in all_arrivals or [workload.arrivals])


def _offered_requests_per_second(outcome: Outcome) -> float | None:
    """Gaps between due times over the time they span: the rate of the arrivals, whenever the first one came."""
    due = [result.scheduled_seconds for result in outcome.results]
    span_seconds = max(due) - min(due) if due else 0.0
    return (len(due) - 1) / span_seconds if span_seconds > 0 else None
