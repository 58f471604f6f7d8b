"""Draws a schedule from a workload and a seed. Pure but for the trace files a workload names; sends nothing.

Every aspect of every tenant (when, for which adapter, how long, what) has a random generator of its own, so that
changing one leaves the others' draws alone: two runs that differ in popularity ask the same questions at the same
times. This file puts the tenants' requests in one order; `tenant_draw.py` draws them.
"""

from __future__ import annotations

import heapq
from collections.abc import Iterator, Sequence
from itertools import count, islice
from pathlib import Path

from msgspec.structs import replace

from heddle_loadtest.errors import SpecError
from heddle_loadtest.workload.adapter_set import adapter_names, spell_out
from heddle_loadtest.workload.consistency import check_workload
from heddle_loadtest.workload.schedule import Schedule, ScheduledUpload
from heddle_loadtest.workload.spec import Storm, Workload
from heddle_loadtest.workload.tenant_draw import TenantDraw
from heddle_loadtest.workload.tenants import split_tenants

CLOSED_LOOP_REQUESTS = 10_000  # of closed loops that only time ends; their streams begin the list again
MAX_REQUESTS = 1_000_000  # a schedule is kept in memory

Turn = tuple[float | None, int]  # when it is due, and the number of its tenant


def draw_schedule(workload: Workload, seed: int, *, folder: Path = Path()) -> Schedule:
    """The same for the same arguments, in every process. `folder` is what trace files are relative to.

    Raises SpecError for parts that do not fit each other, a malformed trace, no request at all or too many.
    """
    if seed < 0:
        raise SpecError("seed", seed, "is negative", "Give 0 or more")
    check_workload(workload)
    tenants = [
        TenantDraw(name, part, seed, folder, workload.uploads if part.adapters == workload.adapters else None)
        for name, part in split_tenants(workload).items()
    ]
    turns: list[Turn] = [*_closed_turns(workload, tenants), *_open_turns(workload, tenants)]
    if not turns:
        raise SpecError("requests", workload.requests, "come to none", "Give a higher rate or more `seconds`")
    times: list[list[float | None]] = [[] for _ in tenants]
    for at_seconds, owner in turns:
        times[owner].append(at_seconds)
    drawn = [iter(tenant.draw(due)) for tenant, due in zip(tenants, times, strict=True)]
    return Schedule(
        requests=tuple(replace(next(drawn[owner]), id=number) for number, (_, owner) in enumerate(turns)),
        uploads=_uploads(workload),
        streams={tenant.name: tenant.streams for tenant in tenants if tenant.streams},
        seconds=workload.seconds,
    )


def with_listed(workload: Workload, names: Sequence[str]) -> Workload:
    """`listed` adapters spelt out, the base first; `names` are the adapters that the target lists."""
    return replace(
        workload,
        adapters=spell_out(workload.adapters, names),
        tenants={
            name: tenant if tenant.adapters is None else replace(tenant, adapters=spell_out(tenant.adapters, names))
            for name, tenant in workload.tenants.items()
        },
    )


def cold_adapters(workload: Workload) -> frozenset[str]:
    """Those that nobody may have asked for before the run: what it uploads, and what a storm asks for."""
    cold = {upload.adapter for upload in _uploads(workload)}
    for tenant in split_tenants(workload).values():
        if isinstance(tenant.popularity, Storm):
            cold.update(adapter_names(tenant.adapters)[tenant.popularity.warm :])
    return frozenset(cold)


def _closed_turns(workload: Workload, tenants: Sequence[TenantDraw]) -> Iterator[Turn]:
    """The closed loops' requests: each tenant's as often as it has streams, evenly mixed."""
    turns = heapq.merge(*(_turns(tenant.streams, owner) for owner, tenant in enumerate(tenants) if tenant.streams))
    return ((None, owner) for _, owner in islice(turns, _limit(workload) or CLOSED_LOOP_REQUESTS))


def _turns(streams: int, owner: int) -> Iterator[tuple[float, int]]:
    return ((number / streams, owner) for number in count(start=1))


def _open_turns(workload: Workload, tenants: Sequence[TenantDraw]) -> list[tuple[float, int]]:
    """The open loops' requests: the earliest of all tenants together."""
    by_time = heapq.merge(*(_due(tenant, owner) for owner, tenant in enumerate(tenants)))
    turns = list(islice(by_time, _limit(workload) or MAX_REQUESTS + 1))
    if len(turns) > MAX_REQUESTS:
        problem = f"makes more than {MAX_REQUESTS:,} requests"
        raise SpecError("seconds", workload.seconds, problem, "Give fewer `seconds`, a lower rate, or `requests`")
    return turns


def _due(tenant: TenantDraw, owner: int) -> Iterator[tuple[float, int]]:
    return ((at_seconds, owner) for at_seconds in tenant.times())


def _limit(workload: Workload) -> int | None:
    if workload.requests is not None and workload.requests > MAX_REQUESTS:
        problem = f"is more than the {MAX_REQUESTS:,} of one schedule"
        raise SpecError("requests", workload.requests, problem, "Give fewer, in several runs")
    return workload.requests


def _uploads(workload: Workload) -> tuple[ScheduledUpload, ...]:
    if workload.uploads is None:
        return ()
    every_seconds = workload.uploads.every_seconds
    newest = adapter_names(workload.adapters)[-workload.uploads.count :]
    return tuple(
        ScheduledUpload(at_seconds=number * every_seconds, adapter=name) for number, name in enumerate(newest, start=1)
    )
