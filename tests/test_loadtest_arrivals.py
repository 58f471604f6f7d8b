"""Arrivals against their distributions: Kolmogorov-Smirnov, with the oracle's formulas and not the generator's."""

from __future__ import annotations

from collections.abc import Callable
from itertools import islice

import numpy as np
import pytest
from numpy.typing import NDArray
from scipy import integrate, stats

from heddle_loadtest.workload.arrivals import OpenLoop, arrival_seconds
from heddle_loadtest.workload.spec import Bursts, Constant, Diurnal, Gamma, Poisson, Ramp

Floats = NDArray[np.float64]

NUM_REQUESTS = 6000
SECONDS = 600.0

# Each kind, and the same with one parameter a tenth or more off, which the test has to notice
KINDS: list[tuple[OpenLoop, OpenLoop]] = [
    (Poisson(rate=8), Poisson(rate=9.5)),
    (Gamma(rate=8, cv=3), Gamma(rate=8, cv=2)),
    (Gamma(rate=8, cv=0.5), Gamma(rate=9, cv=0.5)),
    (Ramp(rate_from=2, rate_to=20), Ramp(rate_from=2, rate_to=16)),
    (Ramp(rate_from=20, rate_to=0), Ramp(rate_from=16, rate_to=0)),
    (Diurnal(rate=10, swing=1.0, period_seconds=60), Diurnal(rate=10, swing=0.7, period_seconds=60)),
    (Diurnal(rate=10, swing=0.5, period_seconds=7), Diurnal(rate=10, swing=0.5, period_seconds=9)),
    (
        Bursts(rate_on=30, rate_off=2, on_seconds=2, off_seconds=5),
        Bursts(rate_on=30, rate_off=6, on_seconds=2, off_seconds=5),
    ),
    (Bursts(rate_on=30, on_seconds=2, off_seconds=5), Bursts(rate_on=26, on_seconds=2, off_seconds=5)),
    (
        Bursts(rate_on=30, on_seconds=0.2, off_seconds=1, random_phases=True),
        Bursts(rate_on=30, on_seconds=0.4, off_seconds=1, random_phases=True),
    ),
]


def draw(arrivals: OpenLoop, seed: int = 5, seconds: float | None = SECONDS, limit: int = NUM_REQUESTS) -> Floats:
    return np.array(list(islice(arrival_seconds(arrivals, np.random.default_rng(seed), seconds), limit)))


def rate_at(arrivals: OpenLoop, at_seconds: Floats) -> Floats:
    match arrivals:
        case Ramp(rate_from=first, rate_to=last):
            return first + (last - first) * at_seconds / SECONDS
        case Diurnal(rate=mean, swing=swing, period_seconds=period):
            return mean + mean * swing * np.sin(2 * np.pi * at_seconds / period)
        case Bursts(rate_on=on, rate_off=off, on_seconds=on_seconds, off_seconds=off_seconds):
            return np.where(at_seconds % (on_seconds + off_seconds) < on_seconds, on, off)
    raise AssertionError(arrivals)


def expected_until(arrivals: OpenLoop, times: Floats) -> Floats:
    """The cumulative rate at `times`, by integrating the rate on a grid of half a millisecond."""
    grid = np.linspace(0, SECONDS, 1_200_001)
    cumulative = integrate.cumulative_trapezoid(rate_at(arrivals, grid), grid, initial=0)
    until: Floats = np.interp(times, grid, cumulative)
    return until


def interrupted_poisson_gaps(bursts: Bursts) -> Callable[[Floats], Floats]:
    """Poisson that is switched on and off is a renewal process with hyperexponential gaps (Kuczura, BSTJ 52, 1973)."""
    rate, leave_on, leave_off = bursts.rate_on, 1 / bursts.on_seconds, 1 / bursts.off_seconds
    total = rate + leave_on + leave_off
    root = np.sqrt(total**2 - 4 * rate * leave_off)
    fast, slow = (total + root) / 2, (total - root) / 2
    share = (rate - slow) / (fast - slow)
    return lambda gap: 1 - share * np.exp(-fast * gap) - (1 - share) * np.exp(-slow * gap)


def p_value(drawn: OpenLoop, believed: OpenLoop) -> float:
    """How likely these times are if they were drawn from `believed`."""
    times = draw(drawn)
    gaps = np.diff(times, prepend=0.0)
    match believed:
        case Poisson(rate=rate):
            return float(stats.kstest(gaps, stats.expon(scale=1 / rate).cdf).pvalue)
        case Gamma(rate=rate, cv=cv):
            return p_value_of_gamma(gaps, stats.gamma(a=cv**-2, scale=cv**2 / rate).cdf)
        case Bursts(random_phases=True):
            return float(stats.kstest(gaps, interrupted_poisson_gaps(believed)).pvalue)
    unit_gaps = np.diff(expected_until(believed, times), prepend=0.0)
    by_gaps = stats.kstest(unit_gaps, stats.expon.cdf).pvalue
    # Given their number, the times are independent draws with the rate as their density
    last = times[-1]
    by_times = stats.kstest(expected_until(believed, times[:-1]) / expected_until(believed, last), "uniform").pvalue
    return float(min(by_gaps, by_times) * 2)


def p_value_of_gamma(gaps: Floats, below: Callable[[Floats | float], Floats]) -> float:
    """Bursty gaps are often smaller than the difference of two times can show: those are only counted."""
    shortest = 1e-9
    likely = float(below(shortest))
    seen = gaps[gaps > shortest]
    by_number = stats.binomtest(len(gaps) - len(seen), len(gaps), likely).pvalue
    by_length = stats.kstest(seen, lambda gap: (below(gap) - likely) / (1 - likely)).pvalue
    return float(min(by_number, by_length) * 2)


@pytest.mark.parametrize(("arrivals", "wrong"), KINDS, ids=repr)
def test_times_follow_their_distribution(arrivals: OpenLoop, wrong: OpenLoop) -> None:
    assert p_value(arrivals, arrivals) > 1e-3
    assert p_value(arrivals, wrong) < 1e-6, "the test could not fail"


def test_constant_is_evenly_spaced_from_the_start() -> None:
    assert draw(Constant(rate=4), seconds=1).tolist() == [0, 0.25, 0.5, 0.75, 1]


def test_gaps_have_the_coefficient_of_variation_that_was_asked_for() -> None:
    for cv in (0.25, 1.0, 4.0):
        gaps = np.diff(draw(Gamma(rate=8, cv=cv), seconds=None, limit=100_000))
        assert gaps.std() / gaps.mean() == pytest.approx(cv, rel=0.05)


def test_one_period_of_bursts_is_silent_where_it_is_off() -> None:
    phase = draw(Bursts(rate_on=30, on_seconds=2, off_seconds=5)) % 7
    assert phase.max() < 2
    assert phase.min() < 0.05


def test_times_ascend_and_end_with_the_run() -> None:
    for arrivals, _ in KINDS:
        times = draw(arrivals, seconds=20)
        assert (np.diff(times) >= 0).all()
        assert times[0] >= 0
        assert times[-1] <= 20


def test_a_ramp_down_to_nothing_ends() -> None:
    times = draw(Ramp(rate_from=20, rate_to=0), seconds=100, limit=10**6)
    assert len(times) == pytest.approx(1000, abs=5 * np.sqrt(1000))
    assert (times > 90).sum() == pytest.approx(10, abs=5 * np.sqrt(10))


def test_a_longer_run_begins_like_a_shorter_one() -> None:
    for arrivals in (Poisson(rate=8), Gamma(rate=8, cv=3), Bursts(rate_on=9, on_seconds=1, off_seconds=1)):
        assert draw(arrivals, seconds=500)[:100].tolist() == draw(arrivals, seconds=50)[:100].tolist()
