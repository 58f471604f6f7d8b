"""What a run came to: every number of a report, in total and by group. Knows no clock, no file and no terminal.

Latencies and tokens are those of the requests that succeeded. Failed ones are counted by error code and break the
service level; abandoned ones (the run was stopped while they were under way) are counted apart from both.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass

import msgspec

from heddle_loadtest.client.result import RequestResult
from heddle_loadtest.measure.bootstrap import Interval, intervals_of
from heddle_loadtest.measure.caveats import caveats_of
from heddle_loadtest.measure.distribution import Distribution
from heddle_loadtest.measure.ending import Ending, ending_of
from heddle_loadtest.measure.fairness import Fairness, fairness_by_adapter, fairness_by_tenant
from heddle_loadtest.measure.repeat import RepeatNumbers, repeat_numbers
from heddle_loadtest.measure.row import Row, row_of
from heddle_loadtest.measure.server_numbers import ServerNumbers, server_numbers
from heddle_loadtest.measure.temperature import Temperature, temperature_of
from heddle_loadtest.measure.uploads import UploadNumbers, upload_numbers
from heddle_loadtest.measure.validity import invalid_reasons, unpublishable_reasons
from heddle_loadtest.run.outcome import Outcome
from heddle_loadtest.workload.spec import Workload

SCHEMA_VERSION = 2  # of to_json(); counts up when a field changes its meaning or goes away, not when one is added
MAX_ADAPTER_ROWS = 50  # S-LoRA's table has 2,000 adapters, and the JSON is one line that people see


@dataclass(frozen=True, slots=True, kw_only=True)
class Summary:
    """A run's outcome, all repeats pooled."""

    workload: Workload
    repeats: tuple[RepeatNumbers, ...]
    total: Row
    adapters: dict[str, Row]  # the MAX_ADAPTER_ROWS most asked for, most first
    other_adapters: Row | None  # all the rest together; None if there are none
    num_adapters: int  # asked for, the rest included
    tenants: dict[str, Row]  # empty where the workload has none
    temperature: Temperature | None  # by where adapters were; None if the target does not say
    fairness_over_adapters: Fairness | None  # None with fewer than two
    fairness_over_tenants: Fairness | None
    lag_seconds: Distribution | None  # how late the client sent, failed requests included
    intervals: dict[str, Interval]  # 95 % by metric, see sample.METRICS; only what was measured often enough
    uploads: UploadNumbers | None  # None where nothing was uploaded
    server: ServerNumbers | None  # what its /metrics say; None if nobody could scrape them
    errors: dict[str, int]  # code -> failed requests, most frequent first; together total.num_failed
    error_examples: dict[str, str]  # code -> the first message seen
    invalid_reasons: tuple[str, ...]  # sentences; empty: the client kept up, the figures are the target's
    unpublishable_reasons: tuple[str, ...]  # sentences; the invalid ones included
    warnings: tuple[str, ...]  # sentences: what to know before using figures that are valid

    @property
    def is_valid(self) -> bool:
        """Whether the figures are the target's, and not the client's."""
        return not self.invalid_reasons

    @property
    def is_publishable(self) -> bool:
        """Whether the figures may stand in a document: valid, complete, and repeated often enough."""
        return not self.unpublishable_reasons

    @property
    def elapsed_seconds(self) -> float:
        """Of all repeats, without the pauses between them."""
        return sum(repeat.elapsed_seconds for repeat in self.repeats)

    @property
    def was_interrupted(self) -> bool:
        """Whether any repeat was stopped before its end."""
        return any(repeat.was_interrupted for repeat in self.repeats)

    def to_json(self) -> dict[str, object]:
        """A dict of plain JSON values; holds no prompts and no key."""
        return {
            "schema_version": SCHEMA_VERSION,
            "workload": self.workload.name,
            "slo": msgspec.to_builtins(self.workload.slo),
            "is_valid": self.is_valid,
            "invalid_reasons": list(self.invalid_reasons),
            "is_publishable": self.is_publishable,
            "unpublishable_reasons": list(self.unpublishable_reasons),
            "warnings": list(self.warnings),
            "was_interrupted": self.was_interrupted,
            "elapsed_seconds": round(self.elapsed_seconds, 6),
            "total": self.total.to_json(),
            "intervals": {name: interval.to_json() for name, interval in self.intervals.items()},
            "repeats": [repeat.to_json() for repeat in self.repeats],
            "errors": self.errors,
            "error_examples": self.error_examples,
            "lag_seconds": self.lag_seconds.to_json() if self.lag_seconds else None,
            "temperature": self.temperature.to_json() if self.temperature else None,
            "fairness_over_adapters": self.fairness_over_adapters.to_json() if self.fairness_over_adapters else None,
            "fairness_over_tenants": self.fairness_over_tenants.to_json() if self.fairness_over_tenants else None,
            "uploads": self.uploads.to_json() if self.uploads else None,
            "server": self.server.to_json() if self.server else None,
            "tenants": _rows_json(self.tenants),
            "num_adapters": self.num_adapters,
            "adapters": _rows_json(self.adapters),
            "other_adapters": self.other_adapters.to_json() if self.other_adapters else None,
        }


def summarize(workload: Workload, outcomes: Sequence[Outcome]) -> Summary:
    """The summary of a run's repeats; of none at all it is empty and invalid."""
    results = [result for outcome in outcomes for result in outcome.results]
    elapsed_seconds = sum(outcome.elapsed_seconds for outcome in outcomes)
    by_adapter = _most_asked_first(_grouped(results, [result.adapter for result in results]))
    by_tenant = _grouped(results, [result.tenant for result in results]) if workload.tenants else {}
    shown = dict(list(by_adapter.items())[:MAX_ADAPTER_ROWS])
    rest = [result for group in list(by_adapter.values())[MAX_ADAPTER_ROWS:] for result in group]
    failures = [result.error for result in results if result.error is not None and ending_of(result) is Ending.FAILED]
    invalid = invalid_reasons(outcomes)
    server = server_numbers(outcomes)
    return Summary(
        workload=workload,
        repeats=tuple(repeat_numbers(workload, outcome) for outcome in outcomes),
        total=row_of(results, elapsed_seconds, workload.slo),
        adapters={name: row_of(group, elapsed_seconds, workload.slo) for name, group in shown.items()},
        other_adapters=row_of(rest, elapsed_seconds, workload.slo) if rest else None,
        num_adapters=len(by_adapter),
        tenants={name: row_of(group, elapsed_seconds, workload.slo) for name, group in by_tenant.items()},
        temperature=temperature_of(results, elapsed_seconds, workload.slo),
        fairness_over_adapters=fairness_by_adapter(results),
        fairness_over_tenants=fairness_by_tenant(results),
        lag_seconds=Distribution.of(result.lag_seconds for result in results),
        intervals=intervals_of(workload, outcomes),
        uploads=upload_numbers(outcomes),
        server=server,
        errors=dict(Counter(error.code for error in failures).most_common()),
        error_examples={error.code: error.message for error in reversed(failures)},
        invalid_reasons=invalid,
        unpublishable_reasons=unpublishable_reasons(outcomes, invalid),
        warnings=caveats_of(workload, outcomes, server),
    )


def _grouped(results: Iterable[RequestResult], keys: Iterable[str]) -> dict[str, list[RequestResult]]:
    groups: dict[str, list[RequestResult]] = {}
    for result, key in zip(results, keys, strict=True):
        groups.setdefault(key, []).append(result)
    return groups


def _most_asked_first(groups: Mapping[str, list[RequestResult]]) -> dict[str, list[RequestResult]]:
    return dict(sorted(groups.items(), key=lambda item: -len(item[1])))


def _rows_json(rows: Mapping[str, Row]) -> dict[str, object]:
    return {name: row.to_json() for name, row in rows.items()}
