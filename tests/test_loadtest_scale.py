"""The same workload at another rate."""

from __future__ import annotations

import pytest

from heddle_loadtest.errors import SpecError
from heddle_loadtest.workload.draw import draw_schedule
from heddle_loadtest.workload.scale import at_rate, mean_rate
from heddle_loadtest.workload.spec import (
    Arrivals,
    Bursts,
    Closed,
    Constant,
    Diurnal,
    Gamma,
    Poisson,
    Ramp,
    Tenant,
    Trace,
    Workload,
)

SECONDS = 400.0
ARRIVALS: dict[str, tuple[Arrivals, float]] = {  # and the requests per second they mean
    "constant": (Constant(rate=5), 5),
    "poisson": (Poisson(rate=5), 5),
    "gamma": (Gamma(rate=5, cv=2), 5),
    "bursts": (Bursts(rate_on=10, rate_off=2, on_seconds=1, off_seconds=3), 4),
    "ramp": (Ramp(rate_from=2, rate_to=8), 5),
    "diurnal": (Diurnal(rate=5, swing=0.9, period_seconds=20), 5),
}


def workload(arrivals: Arrivals, **tenants: Tenant) -> Workload:
    return Workload(name="w", seconds=SECONDS, arrivals=arrivals, tenants=tenants)


@pytest.mark.parametrize("kind", ARRIVALS)
def test_the_mean_is_what_is_drawn_before_and_after(kind: str) -> None:
    arrivals, rate = ARRIVALS[kind]
    assert mean_rate(workload(arrivals)) == pytest.approx(rate)
    faster = at_rate(workload(arrivals), 12.0)
    assert mean_rate(faster) == pytest.approx(12.0)
    drawn = len(draw_schedule(faster, seed=1).requests) / SECONDS
    assert drawn == pytest.approx(12.0, rel=0.12)  # 4,800 requests: two standard deviations of the burstiest are 6 %


def test_tenants_keep_their_proportions() -> None:
    pair = workload(Poisson(rate=1), small=Tenant(), large=Tenant(arrivals=Constant(rate=3)))
    assert mean_rate(pair) == pytest.approx(4)
    doubled = at_rate(pair, 8.0)
    assert doubled.arrivals == Poisson(rate=2)
    assert doubled.tenants["large"].arrivals == Constant(rate=6)
    assert doubled.tenants["small"].arrivals is None


@pytest.mark.parametrize("arrivals", [Closed(streams=2), Trace(file="trace.csv")])
def test_what_has_no_rate_is_refused(arrivals: Arrivals) -> None:
    with pytest.raises(SpecError, match=r"arrivals\.kind: is '(closed|trace)', which has no rate"):
        at_rate(workload(arrivals), 2.0)
    with pytest.raises(SpecError, match="has no rate"):
        mean_rate(workload(Poisson(rate=1), one=Tenant(), other=Tenant(arrivals=arrivals)))


@pytest.mark.parametrize("rate", [0.0, -1.0, 1e9, float("nan"), float("inf")])
def test_a_rate_that_no_spec_may_say_is_refused(rate: float) -> None:
    with pytest.raises(SpecError, match="is impossible"):
        at_rate(workload(Poisson(rate=1)), rate)
