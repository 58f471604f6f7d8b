"""Puts one schedule on one target: sends what is due when it is due, and keeps all that came of it.

Knows no workload, no terminal and no signals. Open loops never wait for an answer, closed loops for each of theirs.
"""

from __future__ import annotations

import asyncio
import itertools
import time
from collections.abc import Callable, Coroutine, Mapping
from contextlib import suppress
from datetime import UTC, datetime
from functools import partial
from pathlib import Path
from typing import Any

from heddle_loadtest.client.chat_client import ChatClient
from heddle_loadtest.client.result import ABANDONED, RequestResult
from heddle_loadtest.client.target import Target
from heddle_loadtest.run.closed_loop import ClosedLoop
from heddle_loadtest.run.dispatcher import Dispatcher
from heddle_loadtest.run.health import HealthMeter, calm_collector, raise_file_limit
from heddle_loadtest.run.outcome import Outcome, UploadResult
from heddle_loadtest.run.scraper import Scraper
from heddle_loadtest.workload.schedule import Schedule, ScheduledRequest, ScheduledUpload

_PAUSE_AFTER_FAILURE_SECONDS = 0.1  # a dead target fails at once; without a pause its streams would spin
# A thousand streams that start in one turn of the event loop stall it for half a second, and then get their
# tokens in lockstep, one burst after the other, for as long as their answers are equally long.
_STREAM_GAP_SECONDS = 0.002

OnStart = Callable[[Schedule], None]
OnResult = Callable[[RequestResult], None]


async def run_schedule(
    schedule: Schedule,
    target: Target,
    *,
    seed: int = 0,
    tenant_keys: Mapping[str, str] | None = None,
    adapter_files: Path | None = None,
    keep_text: bool = True,
    begins_again: bool = True,
    on_start: OnStart | None = None,
    on_result: OnResult | None = None,
    stop: asyncio.Event | None = None,
) -> Outcome:
    """Runs `schedule` to its end, or until `stop` is set: what is under way then is abandoned, and recorded so.

    `target.model` is the base model's name; `seed` is only noted. `tenant_keys` holds the API keys of tenants that
    have their own, `adapter_files` a folder for each adapter to upload. Closed loops with `schedule.seconds` begin
    their list again at its end, unless `begins_again` is False. `on_start` is called when measuring begins,
    `on_result` for each result; an error in either ends the run.
    """
    stop = stop or asyncio.Event()
    raise_file_limit()
    async with ChatClient(target) as client:
        run = _Run(schedule, client, tenant_keys or {}, adapter_files, keep_text, begins_again, on_result)
        scraper = Scraper(client.pages)
        await scraper.take()
        scraping = asyncio.create_task(scraper.keep_taking())
        try:
            with calm_collector(), HealthMeter() as meter:
                if on_start is not None:
                    on_start(schedule)
                started_at, started_seconds = datetime.now(UTC), time.perf_counter()
                await run_until(stop, run.go(started_seconds))
                ended_seconds = time.perf_counter()
        finally:
            scraping.cancel()
        await scraper.take_last()
    return Outcome(
        seed=seed,
        started_at=started_at.isoformat(timespec="milliseconds"),
        started_seconds=started_seconds,
        ended_seconds=ended_seconds,
        was_interrupted=stop.is_set(),
        results=tuple(run.results),
        uploads=tuple(run.uploads),
        scrapes=scraper.scrapes(),
        health=meter.health,
    )


class _Run:
    """One pass over a schedule, and the results it has collected."""

    def __init__(
        self,
        schedule: Schedule,
        client: ChatClient,
        tenant_keys: Mapping[str, str],
        adapter_files: Path | None,
        keep_text: bool,
        begins_again: bool,
        on_result: OnResult | None,
    ) -> None:
        self.results: list[RequestResult] = []
        self.uploads: list[UploadResult] = []
        self._schedule = schedule
        self._client = client
        self._tenant_keys = tenant_keys
        self._adapter_files = adapter_files
        self._keep_text = keep_text
        self._begins_again = begins_again
        self._on_result = on_result
        self._started_seconds = 0.0

    async def go(self, started_seconds: float) -> None:
        """Sends everything; `started_seconds` is the schedule's time 0."""
        self._started_seconds = started_seconds
        async with asyncio.TaskGroup() as tasks:
            begin = partial(self._begin, tasks)
            dispatcher = Dispatcher(self._schedule.requests, started_seconds, begin)
            tasks.create_task(dispatcher.run())
            for upload in self._schedule.uploads:
                tasks.create_task(self._upload(upload))
            for loop, num_streams in self._closed_loops():
                for number in range(min(num_streams, loop.num_requests)):
                    tasks.create_task(self._stream(loop, number))

    def _begin(self, tasks: asyncio.TaskGroup, request: ScheduledRequest, due_seconds: float) -> None:
        tasks.create_task(self._send(request, due_seconds))

    def _closed_loops(self) -> list[tuple[ClosedLoop, int]]:
        requests: dict[str, list[ScheduledRequest]] = {tenant: [] for tenant in self._schedule.streams}
        for request in self._schedule.requests:
            if request.at_seconds is None and request.tenant in requests:
                requests[request.tenant].append(request)
        seconds = self._schedule.seconds
        ends_seconds = None if seconds is None else self._started_seconds + seconds
        first_new_id = 1 + max((request.id for request in self._schedule.requests), default=-1)
        next_id = itertools.count(first_new_id).__next__ if self._begins_again else None
        return [
            (ClosedLoop(requests[tenant], ends_seconds, next_id), num_streams)
            for tenant, num_streams in self._schedule.streams.items()
        ]

    async def _stream(self, loop: ClosedLoop, number: int) -> None:
        """One of a closed loop's streams: asks, waits for the whole answer, asks again."""
        await asyncio.sleep(number * _STREAM_GAP_SECONDS)
        while (request := loop.take()) is not None:
            result = await self._send(request, time.perf_counter())
            if result.error is not None:
                if result.error.code == ABANDONED:
                    return
                await asyncio.sleep(_PAUSE_AFTER_FAILURE_SECONDS)

    async def _send(self, request: ScheduledRequest, due_seconds: float) -> RequestResult:
        key = self._tenant_keys.get(request.tenant)
        result = await self._client.send(request, due_seconds, api_key=key, keep_text=self._keep_text)
        self.results.append(result)
        if self._on_result is not None:
            self._on_result(result)
        return result

    async def _upload(self, upload: ScheduledUpload) -> None:
        due_seconds = self._started_seconds + upload.at_seconds
        await _sleep_until(due_seconds)
        http_status, problem = None, "abandoned: the run was stopped while it was under way"
        with suppress(asyncio.CancelledError):
            folder = (self._adapter_files or Path()) / upload.adapter
            http_status, error = await self._client.pages.upload(upload.adapter, folder)
            problem = "" if error is None else f"{error.code}: {error.message}"
        self.uploads.append(
            UploadResult(
                adapter=upload.adapter,
                scheduled_seconds=due_seconds,
                finished_seconds=time.perf_counter(),
                http_status=http_status,
                error=problem or None,
            )
        )


async def _sleep_until(due_seconds: float) -> None:
    delay_seconds = due_seconds - time.perf_counter()
    if delay_seconds > 0:
        await asyncio.sleep(delay_seconds)


async def run_until(stop: asyncio.Event, work: Coroutine[Any, Any, None]) -> None:
    """Awaits `work`, cancelling it as soon as `stop` is set; does not begin it if that was set before."""
    if stop.is_set():
        work.close()
        return
    work_task = asyncio.create_task(work)
    stop_task = asyncio.create_task(stop.wait())
    try:
        await asyncio.wait({work_task, stop_task}, return_when=asyncio.FIRST_COMPLETED)
    finally:
        stop_task.cancel()
        work_task.cancel()
        with suppress(asyncio.CancelledError):
            await work_task
