"""Goodput: the interval against scipy, the requests that keep a service level against hand-made ones."""

from __future__ import annotations

import pytest
from scipy.stats import binomtest

from heddle_loadtest.client.result import RequestError
from heddle_loadtest.measure.goodput import goodput_of, keeps, wilson_interval
from heddle_loadtest.workload.spec import Slo
from loadtest_samples import make_result

SLO = Slo(ttft_seconds=0.5, tpot_seconds=0.1, end_to_end_seconds=1.0)
ERROR = RequestError("queue_full", "later")


@pytest.mark.parametrize(("num_kept", "num_requests"), [(0, 1), (1, 1), (0, 40), (40, 40), (3, 10), (950, 1000)])
def test_interval_is_wilsons(num_kept: int, num_requests: int) -> None:
    expected = binomtest(num_kept, num_requests).proportion_ci(method="wilson")
    assert wilson_interval(num_kept, num_requests) == pytest.approx((expected.low, expected.high), abs=1e-12)


def test_nothing_is_known_of_no_requests() -> None:
    assert wilson_interval(0, 0) == (0.0, 1.0)
    goodput = goodput_of([], 0.0, SLO)
    assert (goodput.share, goodput.requests_per_second) == (None, 0.0)


@pytest.mark.parametrize(
    ("chunks", "is_kept"),
    [
        ((0.4, 0.45, 0.5), True),
        ((0.6, 0.65), False),  # first token late
        ((0.1, 0.3), False),  # tokens slow
        ((0.4, 0.45, 1.1), False),  # both rates would do, the end is late
        ((0.5,), True),  # at the limit, and no time per token to limit
        ((), False),  # no first token
    ],
)
def test_every_limit_counts(chunks: tuple[float, ...], is_kept: bool) -> None:
    assert keeps(make_result(0.0, *chunks, num_output_tokens=max(1, len(chunks))), SLO) is is_kept


def test_limit_on_the_end_alone_needs_no_content() -> None:
    assert keeps(make_result(0.0), Slo(end_to_end_seconds=1.0))
    assert keeps(make_result(0.0, 5.0), Slo())


def test_late_dispatch_counts_against_the_level() -> None:
    assert keeps(make_result(0.0, 0.45), SLO)
    assert not keeps(make_result(0.0, 0.55, lag=0.1), SLO)


def test_failed_requests_break_the_level_and_abandoned_ones_are_left_out() -> None:
    results = [
        make_result(0.0, 0.1),
        make_result(0.0, 0.1, error=ERROR),  # fast, but not whole
        make_result(0.0, 0.9),
        make_result(0.0, 0.1, error=RequestError("abandoned", "stopped")),
    ]
    goodput = goodput_of(results, 2.0, SLO)
    assert (goodput.num_kept, goodput.num_requests) == (1, 3)
    assert goodput.share == pytest.approx(1 / 3)
    assert goodput.requests_per_second == pytest.approx(0.5)
    expected = binomtest(1, 3).proportion_ci(method="wilson")
    assert goodput.to_json()["share_interval"] == [round(expected.low, 6), round(expected.high, 6)]
