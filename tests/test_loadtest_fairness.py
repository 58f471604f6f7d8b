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
    """The run's mean time to the first token is 0.75 s, and that of a later token as well (3 s for 4)."""
    results = [
        make_result(0.0, 0.5, 1.0, adapter="hot"),
        make_result(5.0, 5.5, 6.0, adapter="hot"),
        make_result(0.0, 1.0, 2.0, 3.0, adapter="cold"),
        make_result(0.0, 1.0, adapter="cold"),
        make_result(0.0, adapter="cold", error=ERROR, finished_seconds=2.0),
        make_result(0.0, adapter="dead", error=ERROR),
    ]
    hot, cold = 2 * (0.75 + 0.75) / 2.0, (2 * 0.75 + 2 * 0.75) / 4.0
    fairness = fairness_by_adapter(results)
    assert fairness is not None
    assert fairness.count == 3
    assert fairness.answered == pytest.approx((1 + 2 / 3) ** 2 / (3 * (1 + 4 / 9)))
    assert fairness.speed == pytest.approx((hot + cold) ** 2 / (2 * (hot**2 + cold**2)))  # of those with answers
    assert fairness.slowest is not None
    assert fairness.fastest is not None
    assert (fairness.slowest.name, fairness.fastest.name) == ("cold", "hot")
    assert (fairness.slowest.relative_speed, fairness.fastest.relative_speed) == pytest.approx((cold, hot))


@pytest.mark.parametrize("lengths", [(4, 400), (1, 2), (1, 1), (7, 7)])
def test_an_even_target_is_fair_whatever_lengths_are_asked_for(lengths: tuple[int, int]) -> None:
    """100 ms to the first token and 10 ms for each later one, for all."""
    results = []
    for adapter, length in zip(("short", "long"), lengths, strict=True):
        chunks = [0.1 + 0.01 * index for index in range(length)]
        results += [make_result(0.0, *chunks, adapter=adapter), make_result(0.0, *chunks[:1], adapter=adapter)]
    fairness = fairness_by_adapter(results)
    assert fairness is not None
    assert fairness.speed == pytest.approx(1.0)
    assert fairness.slowest is not None
    assert fairness.fastest is not None
    assert (fairness.slowest.relative_speed, fairness.fastest.relative_speed) == pytest.approx((1.0, 1.0))


def test_nobody_had_an_answer() -> None:
    fairness = fairness_by_adapter([make_result(0.0, adapter=name, error=ERROR) for name in "ab"])
    assert fairness is not None
    assert (fairness.answered, fairness.speed, fairness.slowest, fairness.fastest) == (None, None, None, None)
    assert fairness.to_json()["slowest"] is None


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
