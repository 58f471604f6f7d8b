"""Jain's index, against values worked out by hand."""

from __future__ import annotations

import pytest

from heddle_loadtest.client.result import RequestError
from heddle_loadtest.measure.fairness import fairness_by_adapter, fairness_by_tenant, jain_index
from loadtest_samples import make_result

ERROR = RequestError("queue_full", "later")


@pytest.mark.parametrize(
    ("values", "expected"),
    [
        ([1.0, 1.0, 1.0], 1.0),
        ([5.0, 0.0, 0.0, 0.0], 0.25),
        ([1.0, 3.0], 16 / 20),
        ([1.0, 2.0, 3.0], 36 / 42),
        ([0.0, 0.0], None),
        ([], None),
    ],
)
def test_index(values: list[float], expected: float | None) -> None:
    assert jain_index(values) == (None if expected is None else pytest.approx(expected))


def test_index_does_not_depend_on_the_unit() -> None:
    assert jain_index([0.001, 0.003]) == pytest.approx(16 / 20)


def test_speed_and_answered_of_adapters() -> None:
    results = [
        make_result(0.0, 0.5, 1.0, adapter="hot"),  # 2 tokens in 1 s
        make_result(5.0, 5.5, 6.0, adapter="hot"),
        make_result(0.0, 1.0, 2.0, adapter="cold"),  # 2 tokens in 2 s
        make_result(0.0, adapter="cold", error=ERROR, finished_seconds=2.0),  # nothing in 2 s
    ]
    fairness = fairness_by_adapter(results)
    assert fairness is not None
    assert fairness.count == 2
    assert fairness.answered == pytest.approx((1 + 0.5) ** 2 / (2 * (1 + 0.25)))
    assert fairness.speed == pytest.approx((2 + 0.5) ** 2 / (2 * (4 + 0.25)))
    assert (fairness.slowest, fairness.fastest) == ("cold", "hot")
    assert (fairness.slowest_tokens_per_second, fairness.fastest_tokens_per_second) == pytest.approx((0.5, 2.0))


def test_how_often_one_asks_does_not_matter() -> None:
    """A popular adapter that is served as fast as the others is no unfairness."""
    results = [make_result(0.0, 0.5, adapter="rare")] + [
        make_result(float(i), i + 0.5, adapter="hot") for i in range(9)
    ]
    fairness = fairness_by_adapter(results)
    assert fairness is not None
    assert fairness.speed == pytest.approx(1.0)


def test_tenants_and_abandoned_requests() -> None:
    results = [
        make_result(0.0, 1.0, tenant="paying"),
        make_result(0.0, 1.0, tenant="free"),
        make_result(0.0, tenant="free", error=RequestError("abandoned", "stopped")),
    ]
    fairness = fairness_by_tenant(results)
    assert fairness is not None
    assert (fairness.answered, fairness.speed) == pytest.approx((1.0, 1.0))


def test_one_alone_is_neither_fair_nor_unfair() -> None:
    assert fairness_by_adapter([make_result(0.0, 1.0)]) is None
    assert fairness_by_tenant([make_result(0.0, 1.0), make_result(0.0, 1.0, adapter="other")]) is None
