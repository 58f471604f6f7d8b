"""The same workload at another rate. Draws nothing."""

from __future__ import annotations

from msgspec.structs import replace

from heddle_loadtest.errors import SpecError
from heddle_loadtest.workload.spec import (
    MAX_RATE,
    Arrivals,
    Bursts,
    Closed,
    Constant,
    Diurnal,
    Gamma,
    Poisson,
    Ramp,
    Trace,
    Workload,
)
from heddle_loadtest.workload.tenants import part_field, split_tenants


def mean_rate(workload: Workload) -> float:
    """Requests per second that the workload offers on average, over all tenants.

    Raises SpecError for a closed loop and for a trace, whose rates are not in the spec.
    """
    tenants = split_tenants(workload)
    return sum(_mean_rate(part.arrivals, part_field(workload, name, "arrivals")) for name, part in tenants.items())


def at_rate(workload: Workload, rate: float) -> Workload:
    """The workload with a mean of `rate` requests per second: all its rates in proportion, all else as it is.

    Raises SpecError for a closed loop, a trace, and a rate beyond what a spec may say.
    """
    if not 0 < rate <= MAX_RATE:
        raise SpecError("rate", rate, "is impossible", f"Give a number above 0, {MAX_RATE:,.0f} at most")
    factor = rate / mean_rate(workload)
    tenants = {
        name: replace(tenant, arrivals=_scaled(tenant.arrivals, factor) if tenant.arrivals else None)
        for name, tenant in workload.tenants.items()
    }
    return replace(workload, arrivals=_scaled(workload.arrivals, factor), tenants=tenants)


def _mean_rate(arrivals: Arrivals, field: str) -> float:
    match arrivals:
        case Constant(rate=rate) | Poisson(rate=rate) | Gamma(rate=rate) | Diurnal(rate=rate):
            return rate
        case Bursts():
            on, off = arrivals.on_seconds, arrivals.off_seconds
            return (arrivals.rate_on * on + arrivals.rate_off * off) / (on + off)
        case Ramp():
            return (arrivals.rate_from + arrivals.rate_to) / 2
        case Closed() | Trace():
            problem = f"is {_kind(arrivals)!r}, which has no rate to change"
            raise SpecError(f"{field}.kind", None, problem, "Use one with a rate, for example poisson")


def _scaled(arrivals: Arrivals, factor: float) -> Arrivals:
    match arrivals:
        case Constant(rate=rate) | Poisson(rate=rate) | Gamma(rate=rate) | Diurnal(rate=rate):
            return replace(arrivals, rate=rate * factor)
        case Bursts():
            return replace(arrivals, rate_on=arrivals.rate_on * factor, rate_off=arrivals.rate_off * factor)
        case Ramp():
            return replace(arrivals, rate_from=arrivals.rate_from * factor, rate_to=arrivals.rate_to * factor)
        case Closed() | Trace():
            return arrivals  # the workload's own, where every tenant has others: `mean_rate` has refused the rest


def _kind(arrivals: Arrivals) -> str:
    return str(type(arrivals).__struct_config__.tag)
