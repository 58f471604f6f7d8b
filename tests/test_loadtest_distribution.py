"""Distributions, against numpy."""

from __future__ import annotations

import numpy as np
import pytest

from heddle_loadtest.measure.distribution import Distribution


@pytest.mark.parametrize("count", [1, 2, 3, 10, 101, 5000])
def test_percentiles_are_numpys(count: int) -> None:
    values = np.random.default_rng(count).exponential(size=count)
    distribution = Distribution.of(float(value) for value in values)
    assert distribution is not None
    found = [distribution.p50, distribution.p90, distribution.p99, distribution.p99_9]
    assert found == pytest.approx([np.percentile(values, percent) for percent in (50, 90, 99, 99.9)])
    assert distribution.mean == pytest.approx(np.mean(values))
    assert (distribution.count, distribution.max) == (count, max(values))


def test_percentiles_lie_between_the_two_nearest_values() -> None:
    distribution = Distribution.of([4.0, 1.0, 2.0, 3.0])
    assert distribution is not None
    assert distribution.p50 == pytest.approx(2.5)
    assert distribution.p90 == pytest.approx(3.7)


def test_nothing_measured_has_no_distribution() -> None:
    assert Distribution.of([]) is None
