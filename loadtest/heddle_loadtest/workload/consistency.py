"""Whether the parts of a workload fit each other; each by itself is `spec.py`'s matter. Reads no file."""

from __future__ import annotations

import re

from heddle_loadtest.errors import SpecError
from heddle_loadtest.workload.adapter_set import adapter_names, num_adapters
from heddle_loadtest.workload.spec import (
    Bursts,
    ByRank,
    Closed,
    Drift,
    FromTrace,
    Questions,
    Ramp,
    Storm,
    Trace,
    Weighted,
    Workload,
)
from heddle_loadtest.workload.tenants import part_field, split_tenants

_TENANT_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{0,63}")
_MIN_PHASE_SECONDS = 0.001  # shorter ones are a rate by themselves, and take a knot each


def check_workload(workload: Workload) -> None:
    """Raises SpecError, with the dotted key, for the first thing that does not fit."""
    tenants = split_tenants(workload)
    for name in workload.tenants:
        if not _TENANT_NAME.fullmatch(name):
            remedy = "Use letters, digits, dots, dashes and underscores, 64 at most"
            raise SpecError("tenants", name, "is no name for a tenant", remedy)
    for name, tenant in tenants.items():
        _check_arrivals(part_field(workload, name, "arrivals"), tenant)
        if not tenant.adapters.listed:
            adapter_names(tenant.adapters)
        shares_adapters = tenant.adapters == workload.adapters
        _check_popularity(part_field(workload, name, "popularity"), tenant, shares_adapters=shares_adapters)
        _check_lengths(workload, name, tenant)
    _check_mixed_loops(tenants)
    _check_uploads(workload, tenants)


def _check_arrivals(field: str, workload: Workload) -> None:
    arrivals = workload.arrivals
    if workload.requests is None and workload.seconds is None and not isinstance(arrivals, Trace):
        raise SpecError(field, None, "have no end", "Give `requests`, `seconds` or both")
    if isinstance(arrivals, Ramp):
        if workload.seconds is None:
            raise SpecError("seconds", None, "is missing: a ramp moves over the run's seconds", "Give `seconds`")
        if arrivals.rate_from == arrivals.rate_to == 0:
            raise SpecError(f"{field}.rate_to", 0, "leaves the ramp without a request", "Give a rate above 0")
    if isinstance(arrivals, Bursts):
        for key in ("on_seconds", "off_seconds"):
            if (seconds := getattr(arrivals, key)) < _MIN_PHASE_SECONDS:
                problem = f"is shorter than {_MIN_PHASE_SECONDS} seconds"
                raise SpecError(f"{field}.{key}", seconds, problem, "Give a longer phase, or `kind: poisson`")


def _check_popularity(field: str, workload: Workload, *, shares_adapters: bool) -> None:
    """`shares_adapters`: whether the adapters are those of which the last ones are uploaded on the way."""
    popularity = workload.popularity
    if isinstance(popularity, Drift | Storm) and isinstance(workload.arrivals, Closed):
        problem = "moves with time, but a closed loop's requests have no times"
        raise SpecError(f"{field}.kind", None, problem, "Give arrivals with a rate, for example `kind: poisson`")
    if isinstance(popularity, ByRank) and workload.adapters.count is None:
        problem = "needs the adapters' ranks, which only `count` adapters have"
        raise SpecError(f"{field}.kind", "by-rank", problem, "Give `adapters.count` and `adapters.kinds`")
    if isinstance(popularity, Weighted) and not any(popularity.weights):
        raise SpecError(f"{field}.weights", None, "are all 0", "Give at least one that is not")
    key, wanted = _wanted_adapters(workload)
    available = num_adapters(workload.adapters)
    if available is not None and workload.uploads is not None and shares_adapters:
        available -= workload.uploads.count
    if available is not None and wanted > available > 0:
        remedy = f"Give {wanted} adapters or more, or a smaller `{key}`"
        raise SpecError(f"{field}.{key}", wanted, f"is more than there are adapters: {available}", remedy)


def _wanted_adapters(workload: Workload) -> tuple[str, int]:
    match workload.popularity:
        case Drift(hot=hot):
            return "hot", hot
        case Storm(warm=warm):
            return "warm", warm
        case Weighted(weights=weights):
            return "weights", len(weights)
        case _:
            return "kind", 1


def _check_lengths(workload: Workload, name: str, tenant: Workload) -> None:
    if isinstance(tenant.arrivals, Trace):
        return
    prompt_tokens = None if isinstance(tenant.prompt, Questions) else tenant.prompt.tokens
    for part, tokens in (("prompt", prompt_tokens), ("output", tenant.output.tokens)):
        if isinstance(tokens, FromTrace):
            field = f"{part_field(workload, name, part)}.tokens.kind"
            raise SpecError(field, "trace", "needs arrivals from a trace", "Give `arrivals` of `kind: trace`")


def _check_mixed_loops(tenants: dict[str, Workload]) -> None:
    """Times and turns cannot be put in one order, so `requests` cannot say which of them come first."""
    are_closed = {isinstance(tenant.arrivals, Closed) for tenant in tenants.values()}
    requests = next(iter(tenants.values())).requests
    if len(are_closed) == 2 and requests is not None:
        problem = "cannot count over closed and open loops together"
        raise SpecError("requests", requests, problem, "Give `seconds` alone")


def _check_uploads(workload: Workload, tenants: dict[str, Workload]) -> None:
    uploads = workload.uploads
    if uploads is None:
        return
    available = num_adapters(workload.adapters)
    if available is None:
        raise SpecError("uploads", None, "need adapters that the target does not list yet", "Give `adapters.count`")
    if available <= uploads.count:
        remedy = f"Give {uploads.count + 1} adapters or more: the last {uploads.count} are uploaded"
        raise SpecError("uploads.count", uploads.count, f"leaves none of {available} adapters for the start", remedy)
    last_seconds = uploads.count * uploads.every_seconds
    if workload.seconds is not None and last_seconds > workload.seconds:
        problem = f"puts the last upload at {last_seconds:g} seconds, after the run's end"
        remedy = "Give fewer, more often, or more `seconds`"
        raise SpecError("uploads.every_seconds", uploads.every_seconds, problem, remedy)
    for name, tenant in tenants.items():
        if isinstance(tenant.arrivals, Closed):
            field = f"{part_field(workload, name, 'arrivals')}.kind"
            raise SpecError(field, "closed", "has no times to upload at", "Give arrivals with a rate")
