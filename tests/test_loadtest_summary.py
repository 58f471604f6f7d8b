"""The numbers of a summary, against numpy and against requests whose times are known."""

import json
import random

import numpy as np
import pytest

from heddle_loadtest.distribution import Distribution, percentile
from heddle_loadtest.report import print_summary
from heddle_loadtest.result import RequestError, RequestResult
from heddle_loadtest.spec import ClosedLoopSpec
from heddle_loadtest.summary import Summary, summarize

SPEC = ClosedLoopSpec(
    target="http://127.0.0.1:8000", num_requests=4, adapters=("base", "[poet]"), model="tiny", api_key="sk-secret"
)


def result(adapter: str, start: float, *chunks: float, error: RequestError | None = None) -> RequestResult:
    return RequestResult(
        adapter=adapter,
        scheduled_seconds=start,
        started_seconds=start,
        finished_seconds=chunks[-1] if chunks else start + 1.0,
        chunk_seconds=chunks,
        text="x" * len(chunks),
        num_prompt_tokens=None,
        num_output_tokens=len(chunks),
        finish_reason="stop",
        http_status=200,
        error=error,
    )


@pytest.fixture
def summary() -> Summary:
    full, lost = RequestError("queue_full", "try [later]"), RequestError("connection_lost", "reset")
    results = [
        result("base", 10.0, 10.5, 10.6, 10.7),
        result("[poet]", 10.0, 11.0, 11.2, 11.8),
        result("base", 11.0, error=lost),
        result("base", 12.0, 13.0, 14.0, error=full),
        result("base", 12.0, error=full),
    ]
    return summarize(SPEC, results)


@pytest.mark.parametrize("count", [1, 2, 3, 10, 101, 1000])
def test_percentiles_are_numpys(count: int) -> None:
    source = random.Random(count)
    values = [source.expovariate(1.0) for _ in range(count)]
    distribution = Distribution.of(values)
    assert distribution is not None
    expected = [np.percentile(values, percent) for percent in (50, 90, 99)]
    assert [distribution.p50, distribution.p90, distribution.p99] == pytest.approx(expected)
    assert distribution.mean == pytest.approx(np.mean(values))
    assert (distribution.count, distribution.max) == (count, max(values))
    assert percentile(sorted(values), 0) == min(values)


def test_nothing_measured_has_no_distribution() -> None:
    assert Distribution.of([]) is None


def test_total(summary: Summary) -> None:
    total = summary.total
    assert (total.num_ok, total.num_failed, total.num_output_tokens) == (2, 3, 6)
    assert summary.elapsed_seconds == pytest.approx(4.0)
    assert total.output_tokens_per_second == pytest.approx(1.5)
    assert total.requests_per_second == pytest.approx(0.5)
    assert total.ttft_seconds is not None
    assert total.ttft_seconds.p50 == pytest.approx(0.75)
    assert total.tpot_seconds is not None
    assert total.tpot_seconds.max == pytest.approx(0.4)
    assert total.inter_token_seconds is not None
    assert total.inter_token_seconds.count == 4
    assert total.inter_token_seconds.max == pytest.approx(0.6)
    assert total.end_to_end_seconds is not None
    assert total.end_to_end_seconds.mean == pytest.approx(1.25)


def test_rows_per_adapter(summary: Summary) -> None:
    assert list(summary.adapters) == ["base", "[poet]"]
    assert [(row.num_ok, row.num_failed) for row in summary.adapters.values()] == [(1, 3), (1, 0)]


def test_errors_are_counted_by_code(summary: Summary) -> None:
    assert list(summary.errors.items()) == [("queue_full", 2), ("connection_lost", 1)]
    assert summary.error_examples == {"queue_full": "try [later]", "connection_lost": "reset"}


def test_answer_of_one_token_has_no_time_per_token() -> None:
    row = summarize(SPEC, [result("base", 0.0, 1.0)]).total
    assert row.ttft_seconds is not None
    assert (row.tpot_seconds, row.inter_token_seconds) == (None, None)


def test_no_requests_at_all() -> None:
    summary = summarize(SPEC, [], was_interrupted=True)
    assert (summary.total.num_ok, summary.elapsed_seconds, summary.total.requests_per_second) == (0, 0.0, 0.0)
    assert json.loads(json.dumps(summary.to_json()))["was_interrupted"] is True


def test_report_ends_in_one_json_line(summary: Summary, capsys: pytest.CaptureFixture[str]) -> None:
    print_summary(summary)
    printed = capsys.readouterr().out
    document = json.loads(printed.splitlines()[-1])
    assert document == summary.to_json()
    assert document["schema_version"] == 1
    assert document["settings"]["adapters"] == ["base", "[poet]"]
    assert "[poet]" in printed.split("{")[0]
    assert "try [later]" in printed.split("{")[0]
    assert "sk-secret" not in printed


def test_report_can_be_the_json_line_alone(summary: Summary, capsys: pytest.CaptureFixture[str]) -> None:
    print_summary(summary, json_only=True)
    assert len(capsys.readouterr().out.splitlines()) == 1
