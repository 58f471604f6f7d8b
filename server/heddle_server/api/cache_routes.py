"""GET /v1/cache: what lies in the page pool and in host memory at this moment."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Annotated, Any

from fastapi import APIRouter, Query, Request

from heddle_adapters.store import AdapterStore
from heddle_adapters.tier import CachedAdapter
from heddle_server.api.engine_metrics import packing_waste, pages_by_kind, requests_by_tier
from heddle_server.api.principal import principal_of
from heddle_server.api.service import service_of
from heddle_server.messages import EngineStats, ModelCard

MAX_ADAPTERS = 10_000

_USES = ("references", "waiting", "uses", "idle_seconds")

router = APIRouter(tags=["cache"])


@router.get("/v1/cache")
async def describe_cache(
    request: Request, limit: Annotated[int, Query(ge=0, le=MAX_ADAPTERS, description="Most used adapters first.")] = 100
) -> dict[str, Any]:
    """Pages by what they hold, the adapters in memory, and what the cache has done since the engine started.

    Adapters that a tenant may not know of are counted and not listed; an admin sees all. Of the others a tenant is not
    told how they are used, nor in which order, and nothing that counts requests: others' would show in it.
    """
    service, principal = service_of(request), principal_of(request)
    report = await service.engine.describe_cache()
    model = service.engine.model
    assert model is not None, "an engine that answers has loaded its model"
    if principal.is_admin:
        in_order = sorted(report.adapters, key=lambda each: (-each.num_uses, each.adapter_digest))
        adapters = [_adapter(each, service.store.names_of(each.adapter_digest)) for each in in_order]
    else:
        adapters = _seen_by(principal.tenant, report.adapters, service.store)
    return {
        "object": "cache",
        "policy": report.policy,
        "pool": _pool(report.stats, model),
        "host": {
            "num_adapters": report.stats.num_host_adapters,
            "bytes": report.stats.host_bytes,
            "budget_bytes": report.stats.host_budget_bytes,
        },
        "requests": {
            "running": report.stats.num_running if principal.is_admin else None,
            "waiting": report.stats.num_waiting if principal.is_admin else None,
        },
        "counters": _counters(report.stats) if principal.is_admin else None,
        "num_adapters": len(report.adapters),
        "num_other_adapters": len(report.adapters) - len(adapters),
        "adapters": adapters[:limit],
    }


def _pool(stats: EngineStats, model: ModelCard) -> dict[str, Any]:
    return {
        "num_pages": stats.num_pages,
        "page_bytes": model.page_bytes,
        "pages": pages_by_kind(stats),
        "pinned_pages": stats.num_pinned_pages,
        "num_adapters": stats.num_resident_adapters,
        "adapter_used_bytes": stats.adapter_used_bytes,
        "packing_waste": round(packing_waste(stats, model), 4),
    }


def _counters(stats: EngineStats) -> dict[str, Any]:
    return {
        "requests_by_tier": requests_by_tier(stats),
        "adapter_loads": stats.num_adapter_loads,
        "adapter_evictions": {"device": stats.num_adapter_evictions, "host": stats.num_host_evictions},
        "prefix_queries": stats.num_prefix_queries,
        "prefix_hits": stats.num_prefix_hits,
        "prefix_evictions": stats.num_prefix_evictions,
        "preemptions": stats.num_preemptions,
        "steps": stats.num_steps,
        "step_seconds": stats.step_seconds,
        "host_seconds": stats.host_seconds,
        "segments": stats.num_segments,
        "computed_tokens": stats.num_computed_tokens,
    }


def _seen_by(tenant: str, adapters: Iterable[CachedAdapter], store: AdapterStore) -> list[dict[str, Any]]:
    """Those that a tenant may know of, by name, without what other tenants' requests for the same content change."""
    pinned = {record.latest.digest for record in store.visible_to(tenant) if record.is_pinned}
    seen = [(store.visible_names_of(each.adapter_digest, tenant), each) for each in adapters]
    return [
        {**_adapter(each, names), "pinned": each.adapter_digest in pinned, **dict.fromkeys(_USES)}
        for names, each in sorted(seen, key=lambda pair: pair[0])
        if names
    ]


def _adapter(adapter: CachedAdapter, names: Iterable[str]) -> dict[str, Any]:
    return {
        "digest": adapter.adapter_digest,
        "names": list(names),
        "tier": adapter.tier,
        "pages": adapter.num_pages,
        "size_bytes": adapter.size_bytes,
        "references": adapter.num_references,
        "waiting": adapter.num_waiting,
        "pinned": adapter.is_pinned,
        "uses": adapter.num_uses,
        "idle_seconds": round(adapter.idle_seconds, 3),
    }
