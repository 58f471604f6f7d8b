"""Whole runs as a target with a small adapter cache would have left them, made by a toy queue and a seed."""

from __future__ import annotations

import random
from collections import OrderedDict
from collections.abc import Sequence
from typing import Any

from heddle_loadtest.client.result import RequestError, RequestResult, ServerReport
from heddle_loadtest.measure.summary import summarize
from heddle_loadtest.report.stored_run import StoredRun
from heddle_loadtest.run.outcome import Outcome, UploadResult
from heddle_loadtest.workload.spec import Adapters, Poisson, Slo, Tenant, Uploads, Workload, Zipf
from loadtest_samples import make_outcome, make_result

WORKLOAD = Workload(
    name="sample",
    about="Zipf over sixty adapters, of which sixteen fit.",
    requests=400,
    arrivals=Poisson(rate=20.0),
    adapters=Adapters(count=60),
    popularity=Zipf(alpha=1.0),
    tenants={"free": Tenant(), "paying": Tenant()},
    uploads=Uploads(count=2, every_seconds=5.0),
    slo=Slo(ttft_seconds=0.5, tpot_seconds=0.05),
)
ENVIRONMENT = {
    "date": "2026-11-21T12:00:00+00:00",
    "command": "heddle-loadtest run sample",
    "target": {"url": "http://127.0.0.1:8000", "style": "heddle", "model": "tiny"},
    "machine": {"cpu": "Toy CPU", "num_usable_cores": 2, "memory_bytes": 8 * 2**30, "system": "Linux 6"},
    "python": "3.11.9",
}
ON_DEVICE, IN_HOST, POOL_PAGES = 16, 32, 512


def make_run(
    *, num_repeats: int = 3, num_requests: int = 400, workload: Workload = WORKLOAD, name: str = "sample-run"
) -> StoredRun:
    """A whole run."""
    outcomes = tuple(make_repeat(seed, num_requests) for seed in range(num_repeats))
    return stored(outcomes, workload=workload, name=name)


def stored(outcomes: Sequence[Outcome], *, workload: Workload = WORKLOAD, name: str = "sample-run") -> StoredRun:
    """These outcomes with their summary."""
    summary: dict[str, Any] = summarize(workload, outcomes).to_json()
    return StoredRun(
        name=name, workload=workload, environment=dict(ENVIRONMENT), outcomes=tuple(outcomes), summary=summary
    )


def make_repeat(seed: int, num_requests: int = 400, *, started: float = 1000.0) -> Outcome:
    """Arrivals at 20 a second; two least-recently-used tiers; one request in fifty fails; a scrape a second."""
    source = random.Random(seed)
    names = [f"adapter-{index:05d}" for index in range(60)]
    weights = [1 / (index + 1) for index in range(60)]
    device: OrderedDict[str, None] = OrderedDict()
    host: OrderedDict[str, None] = OrderedDict()
    results: list[RequestResult] = []
    scrapes: list[dict[str, float]] = []
    at = started
    for index in range(num_requests):
        at += source.expovariate(20.0)
        while at - started > len(scrapes):
            scrapes.append(_samples(len(device), len(host), source))
        adapter = "base" if source.random() < 0.15 else source.choices(names, weights)[0]
        cache = None if adapter == "base" else _touch(adapter, device, host)
        results.append(_request(index, at, adapter, cache, source))
    scrapes += [_samples(len(device), len(host), source)] * 2
    uploads = [UploadResult(adapter="new", scheduled_seconds=at, finished_seconds=at + 0.25, http_status=201)]
    loop_lag = [source.expovariate(2000.0) for _ in range(200)]
    return make_outcome(results, seed=seed, started=started, scrapes=scrapes, uploads=tuple(uploads), loop_lag=loop_lag)


def _request(index: int, at: float, adapter: str, cache: str | None, source: random.Random) -> RequestResult:
    fields: dict[str, Any] = {"id": index, "adapter": adapter, "tenant": source.choice(("free", "paying"))}
    fields["lag"] = source.expovariate(2000.0)
    if source.random() < 0.02:
        return make_result(at, error=RequestError("queue_full", "the queue is full"), **fields)
    load = {None: 0.0, "device": 0.0, "host": 0.02, "disk": 0.15}[cache] * source.lognormvariate(0, 0.3)
    first = at + load + 0.04 * source.lognormvariate(0, 0.6)
    gaps = [0.02 * source.lognormvariate(0, 0.3) for _ in range(source.randint(8, 48))]
    chunks = [first]
    for gap in gaps:
        chunks.append(chunks[-1] + gap)
    report = ServerReport(cache=cache, load_seconds=load, queue_seconds=load + 0.005, ttft_seconds=first - at)
    return make_result(at, *chunks, server=report, **fields)


def _touch(adapter: str, device: OrderedDict[str, None], host: OrderedDict[str, None]) -> str:
    tier = "device" if adapter in device else "host" if adapter in host else "disk"
    for held, limit in ((device, ON_DEVICE), (host, IN_HOST)):
        held[adapter] = None
        held.move_to_end(adapter)
        if len(held) > limit:
            held.popitem(last=False)
    return tier


def _samples(num_device: int, num_host: int, source: random.Random) -> dict[str, float]:
    kv, cached, adapter = source.randint(60, 120), source.randint(100, 140), 8 * num_device
    pages = {"adapter": adapter, "kv": kv, "cached": cached, "loading": 0, "free": POOL_PAGES - adapter - kv - cached}
    samples = {f'heddle_pool_pages{{kind="{kind}"}}': float(number) for kind, number in pages.items()}
    samples['heddle_adapters_resident{tier="device"}'] = float(num_device)
    samples['heddle_adapters_resident{tier="host"}'] = float(num_host)
    return samples
