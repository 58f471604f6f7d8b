"""The first requests to each adapter, so that loading it is not measured. Knows no results: nothing is recorded."""

from __future__ import annotations

import asyncio
from collections.abc import Collection, Iterable, Mapping

import msgspec

from heddle_loadtest.client.chat_client import ChatClient
from heddle_loadtest.workload.schedule import Schedule, ScheduledRequest

_MAX_AT_ONCE = 16
_MAX_TOKENS = 8  # enough to load an adapter and compile a decode step
_QUESTION = "Say hello."  # of none of the prompts, so that no prefix cache knows those yet
_NUM_TOKEN_IDS = 16


async def warm_up(
    client: ChatClient,
    schedule: Schedule,
    times: int,
    cold: Collection[str] = (),
    tenant_keys: Mapping[str, str] | None = None,
) -> None:
    """Short requests, `times` to each adapter that is not in `cold`; one that fails leaves it cold."""
    slots = asyncio.Semaphore(_MAX_AT_ONCE)

    async def send(request: ScheduledRequest) -> None:
        async with slots:
            await client.send(request, 0.0, api_key=(tenant_keys or {}).get(request.tenant), keep_text=False)

    async with asyncio.TaskGroup() as tasks:
        for request in warm_up_requests(schedule, cold):
            for _ in range(times):
                tasks.create_task(send(request))


def warm_up_requests(schedule: Schedule, cold: Collection[str] = ()) -> Iterable[ScheduledRequest]:
    """One to each adapter, in the manner of its first request in the schedule."""
    first_requests: dict[str, ScheduledRequest] = {}
    for request in schedule.requests:
        if request.adapter not in cold:
            first_requests.setdefault(request.adapter, request)
    for request in first_requests.values():
        prompt = _QUESTION if isinstance(request.prompt, str) else request.prompt[::-1][:_NUM_TOKEN_IDS]
        yield msgspec.structs.replace(request, prompt=prompt, max_tokens=min(request.max_tokens, _MAX_TOKENS))
