"""What a reader should know before using figures that are valid: what was counted in another way, or differs."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

from heddle_loadtest.client.result import RequestResult
from heddle_loadtest.measure.repeat import has_closed_loop
from heddle_loadtest.measure.server_numbers import Check, ServerNumbers
from heddle_loadtest.run.outcome import Outcome
from heddle_loadtest.workload.spec import Workload
from heddle_loadtest.workload.tenants import split_tenants


def caveats_of(workload: Workload, outcomes: Sequence[Outcome], server: ServerNumbers | None) -> tuple[str, ...]:
    """A sentence for each; none where there is nothing to know. `server` holds what the target counted."""
    good = [result for outcome in outcomes for result in outcome.results if result.is_ok]
    differing = [check for check in server.checks if not check.is_within_tolerance] if server is not None else []
    return (
        *_without_usage(good),
        *_too_short(workload, good),
        *(_difference(check) for check in differing),
        *([] if has_closed_loop(workload) else _long_drains(outcomes)),
    )


def _without_usage(good: Sequence[RequestResult]) -> Iterator[str]:
    if number := sum(result.num_prompt_tokens is None for result in good):
        yield f"{number:,} of {len(good):,} answers came without usage: their tokens are counted as chunks."


def _too_short(workload: Workload, good: Sequence[RequestResult]) -> Iterator[str]:
    exact = {name for name, part in split_tenants(workload).items() if part.output.exact}
    asked = [result for result in good if result.tenant in exact]
    if number := sum(result.finish_reason != "length" for result in asked):
        yield f"{number:,} of {len(asked):,} answers ended before the length that the workload asks for exactly."


def _difference(check: Check) -> str:
    if "time" in check.name:
        client, server = (f"{seconds * 1000:,.1f} ms" for seconds in (check.client, check.server))
    else:
        client, server = (f"{count:,.0f}" for count in (check.client, check.server))
    return f"Client and target disagree on {check.name}: {client} here, {server} there ({check.metric})."


def _long_drains(outcomes: Sequence[Outcome]) -> Iterator[str]:
    """Repeats whose queue took longer to empty than the requests took to come."""
    times = [(_drain_seconds(outcome), _arrival_seconds(outcome)) for outcome in outcomes]
    found = [(drain, arrivals) for drain, arrivals in times if drain > arrivals > 0]
    if found:
        drain_seconds, arrival_seconds = max(found)
        yield (
            f"In {len(found)} of {len(times)} repeats the answers came in long after the arrivals had ended: "
            f"{drain_seconds:.1f} s after {arrival_seconds:.1f} s of arrivals. Rates are over the whole time."
        )


def _drain_seconds(outcome: Outcome) -> float:
    return outcome.ended_seconds - max((result.scheduled_seconds for result in outcome.results), default=0.0)


def _arrival_seconds(outcome: Outcome) -> float:
    due = [result.scheduled_seconds for result in outcome.results]
    return max(due) - min(due) if due else 0.0
