"""The numbers of a summary, against requests whose times are known."""

from __future__ import annotations

import json

import pytest
from msgspec.structs import replace
from scipy import stats

from heddle_loadtest.client.result import RequestError
from heddle_loadtest.measure.summary import MAX_ADAPTER_ROWS, SCHEMA_VERSION, Summary, summarize
from heddle_loadtest.run.outcome import Outcome, UploadResult
from heddle_loadtest.workload.spec import Output, Slo, Tenant, Workload
from loadtest_samples import CLOSED_LOOP, OPEN_LOOP, make_cached_result, make_outcome, make_result

FULL, LOST = RequestError("queue_full", "try [later]"), RequestError("connection_lost", "reset")
ABANDONED = RequestError("abandoned", "the run was stopped")
WORKLOAD = replace(OPEN_LOOP, slo=Slo(ttft_seconds=0.9))


@pytest.fixture
def summary() -> Summary:
    first = [
        make_result(10.0, 10.5, 10.6, 10.7),
        make_result(10.0, 11.0, 11.2, 11.8, adapter="[poet]"),
        make_result(11.0, error=LOST),
        make_result(12.0, 13.0, 14.0, error=FULL),
    ]
    second = [make_result(0.0, error=FULL), make_result(1.0, error=ABANDONED, lag=0.25)]
    outcomes = [
        make_outcome(first, started=10.0, seed=7),
        make_outcome(second, seed=8, was_interrupted=True),
    ]
    return summarize(WORKLOAD, outcomes)


def test_total_pools_the_repeats(summary: Summary) -> None:
    total = summary.total
    assert (total.num_ok, total.num_failed, total.num_abandoned, total.num_output_tokens) == (2, 3, 1, 6)
    assert total.error_rate == pytest.approx(0.6)
    assert summary.elapsed_seconds == pytest.approx(4.0 + 2.0)
    assert total.output_tokens_per_second == pytest.approx(1.0)
    assert total.requests_per_second == pytest.approx(2 / 6)
    assert total.ttft_seconds is not None
    assert total.ttft_seconds.p50 == pytest.approx(0.75)
    assert total.tpot_seconds is not None
    assert total.tpot_seconds.max == pytest.approx(0.4)
    assert total.inter_token_seconds is not None
    assert total.inter_token_seconds.count == 4
    assert total.inter_token_seconds.max == pytest.approx(0.6)
    assert total.end_to_end_seconds is not None
    assert total.end_to_end_seconds.mean == pytest.approx(1.25)


def test_failed_requests_break_the_service_level(summary: Summary) -> None:
    assert summary.total.goodput is not None
    assert (summary.total.goodput.num_kept, summary.total.goodput.num_requests) == (1, 5)


def test_rows_per_adapter_the_most_asked_first(summary: Summary) -> None:
    found = {name: (row.num_ok, row.num_failed, row.num_abandoned) for name, row in summary.adapters.items()}
    assert list(found.items()) == [("base", (1, 3, 1)), ("[poet]", (1, 0, 0))]
    assert (summary.num_adapters, summary.other_adapters) == (2, None)
    assert summary.fairness_over_adapters is not None


def test_errors_are_counted_by_code_with_the_first_message(summary: Summary) -> None:
    assert list(summary.errors.items()) == [("queue_full", 2), ("connection_lost", 1)]
    assert sum(summary.errors.values()) == summary.total.num_failed
    assert summary.error_examples == {"queue_full": "try [later]", "connection_lost": "reset"}


def test_each_repeat_has_its_own_numbers(summary: Summary) -> None:
    first, second = summary.repeats
    assert (first.seed, first.num_ok, first.num_failed, first.num_abandoned) == (7, 2, 2, 0)
    assert first.requests_per_second == pytest.approx(0.5)
    assert first.output_tokens_per_second == pytest.approx(1.5)
    assert first.offered_requests_per_second == pytest.approx(3 / 2)
    assert (second.seed, second.num_ok, second.num_failed, second.num_abandoned) == (8, 0, 1, 1)


def test_verdicts(summary: Summary) -> None:
    assert summary.lag_seconds is not None
    assert summary.lag_seconds.max == pytest.approx(0.25)
    assert not summary.is_valid  # sent 250 ms late
    assert not summary.is_publishable
    assert summary.was_interrupted
    assert set(summary.invalid_reasons) < set(summary.unpublishable_reasons)


def test_three_good_repeats_may_be_published() -> None:
    results = [make_result(float(at), at + 0.1, at + 0.2) for at in range(5)]
    summary = summarize(WORKLOAD, [make_outcome(results, seed=seed) for seed in range(3)])
    assert summary.is_valid
    assert summary.is_publishable
    interval = summary.intervals["ttft_p50"]
    assert (interval.low, interval.high) == pytest.approx((0.1, 0.1))


def test_warm_and_cold_apart() -> None:
    results = [
        make_cached_result(0.0, 0.4, cache="device"),
        make_cached_result(0.0, 0.4, cache="device"),
        make_cached_result(0.0, 0.5, cache="host"),
        make_cached_result(0.0, 0.9, cache="disk"),
        make_cached_result(0.0, 0.3, cache=None),  # the base model
        make_result(0.0, error=FULL, adapter="poet"),  # nobody knows
    ]
    temperature = summarize(WORKLOAD, [make_outcome(results)]).temperature
    assert temperature is not None
    assert temperature.warm.ttft_seconds is not None
    assert temperature.warm.ttft_seconds.p50 == pytest.approx(0.4)
    assert temperature.cold.ttft_seconds is not None
    assert temperature.cold.ttft_seconds.p50 == pytest.approx(0.7)
    assert {tier: row.num_ok for tier, row in temperature.tiers.items()} == {"device": 2, "host": 1, "disk": 1}
    assert temperature.hit_rates == {"device": 0.5, "host": 0.25, "disk": 0.25}
    assert temperature.parts is not None
    assert temperature.parts.num_requests == 5
    assert temperature.parts.ttft_seconds == pytest.approx(0.5)
    assert temperature.parts.queue_share == pytest.approx(0.4)
    assert temperature.parts.load_share == pytest.approx(0.04 / 0.5)


def test_target_that_tells_nothing_has_no_temperature(summary: Summary) -> None:
    assert summary.temperature is None


def test_tenants() -> None:
    results = [make_result(0.0, 0.5, tenant="paying"), make_result(0.0, error=FULL, tenant="free")]
    workload = replace(WORKLOAD, tenants={"paying": Tenant(), "free": Tenant()})
    summary = summarize(workload, [make_outcome(results)])
    assert {name: row.num_ok for name, row in summary.tenants.items()} == {"paying": 1, "free": 0}
    assert summary.fairness_over_tenants is not None
    assert summary.fairness_over_tenants.answered == pytest.approx(0.5)


def test_adapters_beyond_the_bound_are_one_row() -> None:
    names = [f"adapter-{index:03}" for index in range(MAX_ADAPTER_ROWS + 30)]
    results = [make_result(0.0, 0.5, adapter=name) for name in (*names, *names[40:])]
    summary = summarize(WORKLOAD, [make_outcome(results)])
    assert summary.num_adapters == MAX_ADAPTER_ROWS + 30
    assert list(summary.adapters)[:40] == names[40:]  # asked for twice
    assert len(summary.adapters) == MAX_ADAPTER_ROWS
    assert summary.other_adapters is not None
    assert summary.other_adapters.num_ok + sum(row.num_ok for row in summary.adapters.values()) == len(results)


def test_uploads() -> None:
    uploads = (
        UploadResult(adapter="new", scheduled_seconds=1.0, finished_seconds=1.5, http_status=201),
        UploadResult(adapter="newer", scheduled_seconds=2.0, finished_seconds=9.0, http_status=507, error="full"),
    )
    numbers = summarize(WORKLOAD, [make_outcome([make_result(0.0, 0.5)], uploads=uploads)]).uploads
    assert numbers is not None
    assert (numbers.num_ok, numbers.num_failed, numbers.error_example) == (1, 1, "full")
    assert numbers.seconds is not None
    assert numbers.seconds.max == pytest.approx(0.5)


def test_answer_of_one_token_has_no_time_per_token() -> None:
    row = summarize(WORKLOAD, [make_outcome([make_result(0.0, 1.0)])]).total
    assert row.ttft_seconds is not None
    assert (row.tpot_seconds, row.inter_token_seconds) == (None, None)


@pytest.mark.parametrize("num_repeats", [0, 1])
def test_no_requests_at_all(num_repeats: int) -> None:
    summary = summarize(WORKLOAD, [make_outcome([])] * num_repeats)
    assert (summary.total.num_ok, summary.elapsed_seconds, summary.total.requests_per_second) == (0, 0.0, 0.0)
    assert summary.total.error_rate is None
    assert not summary.is_valid
    json.dumps(summary.to_json(), allow_nan=False)


SCRAPES = [{"heddle_generated_tokens_total": count} for count in (0.0, 9.0)]


@pytest.mark.parametrize(
    ("workload", "outcome", "words"),
    [
        (
            OPEN_LOOP,
            make_outcome([make_result(0.0, 0.5), make_result(0.0, 0.5, num_prompt_tokens=None)]),
            "1 of 2 answers came without usage",
        ),
        (
            replace(OPEN_LOOP, output=Output(tokens=9)),
            make_outcome([make_result(0.0, 0.5), make_result(0.0, 0.5, finish_reason="length")]),
            "1 of 2 answers ended before the length",
        ),
        (
            replace(
                OPEN_LOOP,
                output=Output(tokens=9),
                tenants={"a": Tenant(output=Output(tokens=9, exact=False)), "b": Tenant()},
            ),
            make_outcome([make_result(0.0, 0.5, tenant="a"), make_result(0.0, 0.5, tenant="b")]),
            "1 of 1 answers ended before the length",
        ),
        (
            OPEN_LOOP,
            make_outcome([make_result(0.0, 0.1, 0.2, 0.3)], scrapes=SCRAPES),
            "Client and target disagree on output tokens: 3 here, 9 there (heddle_generated_tokens_total).",
        ),
        (
            OPEN_LOOP,
            make_outcome([make_result(0.0, 0.5), make_result(2.0, 5.0)]),
            "In 1 of 1 repeats the answers came in long after the arrivals had ended: 3.0 s after 2.0 s",
        ),
    ],
)
def test_warnings(workload: Workload, outcome: Outcome, words: str) -> None:
    summary = summarize(workload, [outcome])
    (warning,) = summary.warnings
    assert words in warning
    assert summary.to_json()["warnings"] == [warning]
    assert summary.is_valid


def test_no_warnings() -> None:
    """As asked for, with usage, answered at once; a closed loop's arrivals have no end of their own."""
    exact = replace(OPEN_LOOP, output=Output(tokens=1))
    at_once = [make_result(float(at), at + 0.5, finish_reason="length") for at in range(3)]
    assert summarize(exact, [make_outcome(at_once)]).warnings == ()
    assert summarize(CLOSED_LOOP, [make_outcome([make_result(0.0, 0.5), make_result(2.0, 5.0)])]).warnings == ()
    assert summarize(OPEN_LOOP, [make_outcome([make_result(0.0, error=FULL, num_prompt_tokens=None)])]).warnings == ()
    assert summarize(OPEN_LOOP, [make_outcome([])]).warnings == ()


def test_share_of_failed_requests_has_an_interval(summary: Summary) -> None:
    document = summary.total.to_json()
    assert document["error_rate"] == pytest.approx(0.6)
    assert document["error_rate_interval"] == pytest.approx(
        stats.binomtest(3, 5).proportion_ci(method="wilson"), abs=1e-6
    )


def test_json_is_plain_and_holds_no_prompt(summary: Summary) -> None:
    document = json.loads(json.dumps(summary.to_json(), allow_nan=False))
    assert document == summary.to_json()
    assert document["schema_version"] == SCHEMA_VERSION == 2
    assert document["workload"] == "sample"
    assert document["slo"] == {"ttft_seconds": 0.9, "tpot_seconds": None, "end_to_end_seconds": None}
    assert document["is_valid"] is False
    assert document["total"]["ttft_seconds"]["p99_9"] > 0.99
    assert len(document["repeats"]) == 2
