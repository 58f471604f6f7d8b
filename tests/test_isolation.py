"""Nobody is ever answered by somebody else's adapter, whatever is uploaded, replaced, deleted and evicted meanwhile.

Each adapter forces a token of its own, and the server has room for four of them beside the requests of a few clients.
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import Awaitable, Callable, Iterator
from typing import Any

import pytest

from crowd import NUM_NAMES, Act, Crowd
from demo_server import DemoClient, DemoServer, demo_client, demo_server

PAGE_BYTES = 6 * 2 * 128 * 16 * 4  # layers, key and value, their width, tokens, float32
MEAN_ADAPTER_PAGES = 6
ROOM = 4  # adapters
POOL_PAGES = ROOM * MEAN_ADAPTER_PAGES + 20  # the rest is for keys and values
HOST_BYTES = 2 * ROOM * MEAN_ADAPTER_PAGES * PAGE_BYTES
NUM_CLIENTS = 32

CHURN: dict[Act, int] = {"ask": 88, "replace": 5, "delete": 5, "add": 2}
DISCONNECTS: dict[Act, int] = {"ask": 65, "leave": 30, "replace": 3, "delete": 2}


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[DemoServer]:
    with demo_server(
        tmp_path_factory.mktemp("isolation"), pool_bytes=POOL_PAGES * PAGE_BYTES, host_cache_bytes=HOST_BYTES
    ) as server:
        yield server


async def churn(
    server: DemoServer, num_acts: int, *, tokens: tuple[int, int], weights: dict[Act, int]
) -> dict[str, Any]:
    """Lets a crowd loose on the server; what it met, when nothing of it was wrong and nothing is left over."""
    async with demo_client(server) as client:
        crowd = Crowd(client, seed=num_acts, tokens=tokens, weights=weights)
        await crowd.settle()
        started_seconds = time.monotonic()
        await crowd.run(num_acts, NUM_CLIENTS)
        seconds = time.monotonic() - started_seconds
        findings = crowd.judge()
        findings.check()
        await eventually(lambda: nothing_is_held(client))
        counters = (await client.get("/v1/cache"))["counters"]
        await crowd.leave_nothing()
        await eventually(lambda: nothing_is_left(client, server))
        return {**findings.figures, "seconds": round(seconds, 1), "counters": counters}


async def eventually(is_true: Callable[[], Awaitable[bool]], seconds: float = 20.0) -> None:
    deadline = time.monotonic() + seconds
    while not await is_true():
        assert time.monotonic() < deadline, "waited in vain"
        await asyncio.sleep(0.1)


async def nothing_is_held(client: DemoClient) -> bool:
    """No request, reference or page of keys and values is left, and the pages add up."""
    cache, gauges = await client.get("/v1/cache?limit=10000"), await client.gauges()
    pages = cache["pool"]["pages"]
    assert sum(pages.values()) == cache["pool"]["num_pages"] == POOL_PAGES
    held = [
        *cache["requests"].values(),
        *(each["references"] + each["waiting"] for each in cache["adapters"]),
        *(pages["kv"], pages["loading"]),
        *(gauges["heddle_requests_running"], gauges["heddle_requests_waiting"]),
        gauges['heddle_pool_pages{kind="kv"}'],
    ]
    return not any(held)


async def nothing_is_left(client: DemoClient, server: DemoServer) -> bool:
    """No adapter is known, in memory or on disk."""
    cache = await client.get("/v1/cache")
    files = [path for pattern in ("content/*", "incoming/*", "rows/*/*") for path in server.store.glob(pattern)]
    known = (await client.get("/v1/adapters"))["data"]
    return not known and not files and not cache["num_adapters"] and not cache["pool"]["pages"]["adapter"]


def test_no_token_comes_from_another_adapter(
    server: DemoServer, record_property: Callable[[str, object], None]
) -> None:
    figures = asyncio.run(churn(server, 500, tokens=(4, 4), weights=CHURN))
    record_property("figures", figures)
    assert figures["answered"] > 350, f"{figures}"
    assert figures["adapter_not_found"] > 0, f"{figures}"
    counters = figures["counters"]
    assert counters["adapter_evictions"]["device"] > NUM_NAMES, f"{counters}"
    assert counters["adapter_evictions"]["host"] > NUM_NAMES, f"{counters}"
    assert counters["prefix_hits"] > 0, f"{counters}"


def test_clients_that_leave_take_nothing_from_those_who_stay(server: DemoServer) -> None:
    figures = asyncio.run(churn(server, 200, tokens=(4, 40), weights=DISCONNECTS))
    assert figures["left early"] > 20, f"{figures}"


@pytest.mark.slow
@pytest.mark.timeout(3600)
def test_no_token_of_twenty_thousand_requests_comes_from_another_adapter(
    server: DemoServer, record_property: Callable[[str, object], None]
) -> None:
    figures = asyncio.run(churn(server, 20_000, tokens=(4, 16), weights=CHURN))
    record_property("figures", figures)
