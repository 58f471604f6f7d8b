"""Runs a closed loop: fit the spec to the target, warm up, measure, summarize. Knows no terminal and no signals."""

import asyncio
import time
from collections.abc import Callable, Coroutine
from contextlib import suppress
from typing import Any

from heddle_loadtest.client import ChatClient
from heddle_loadtest.result import RequestResult
from heddle_loadtest.spec import ClosedLoopSpec
from heddle_loadtest.summary import Summary, summarize
from heddle_loadtest.target import fit_to_target
from heddle_loadtest.workload import Ask, Workload

_WARMUP_MAX_TOKENS = 8  # enough to load an adapter and compile a decode step
_PAUSE_AFTER_FAILURE_SECONDS = 0.1  # a dead target fails at once; without a pause its streams would spin


async def run_closed_loop(
    spec: ClosedLoopSpec,
    *,
    on_start: Callable[[ClosedLoopSpec], None] | None = None,
    on_result: Callable[[RequestResult], None] | None = None,
    stop: asyncio.Event | None = None,
) -> Summary:
    """Runs `spec` to its end, or until `stop` is set, and summarizes the requests that finished.

    `on_start` gets the spec as fitted to the target when measuring begins, `on_result` each measured request.
    Raises TargetError before any chat request if the target is down, is no OpenAI server or lacks an adapter.
    """
    stop = stop or asyncio.Event()
    key, style, timeout_seconds = spec.api_key, spec.style, spec.timeout_seconds
    async with ChatClient(spec.target, key, style=style, timeout_seconds=timeout_seconds) as client:
        spec = await fit_to_target(spec, client)
        await _run_until(stop, _warm_up(spec, client))
        loop = _ClosedLoop(spec, client, on_result)
        if on_start is not None and not stop.is_set():
            on_start(spec)
        await _run_until(stop, loop.run())
    return summarize(spec, loop.results, was_interrupted=stop.is_set())


class _ClosedLoop:
    """The streams of one run and the results they have collected."""

    def __init__(
        self, spec: ClosedLoopSpec, client: ChatClient, on_result: Callable[[RequestResult], None] | None
    ) -> None:
        self.results: list[RequestResult] = []
        self._spec = spec
        self._client = client
        self._on_result = on_result
        self._workload = Workload(spec.adapters, spec.prompts, spec.seed)
        self._num_started = 0
        self._started_seconds = 0.0

    async def run(self) -> None:
        self._started_seconds = time.perf_counter()
        async with asyncio.TaskGroup() as streams:
            for _ in range(self._spec.num_streams):
                streams.create_task(self._stream())

    async def _stream(self) -> None:
        while self._has_next():
            result = await _send(self._spec, self._client, self._next_ask(), self._spec.max_tokens)
            self.results.append(result)
            if self._on_result is not None:
                self._on_result(result)
            if not result.is_ok:
                await asyncio.sleep(_PAUSE_AFTER_FAILURE_SECONDS)

    def _has_next(self) -> bool:
        limit, duration_seconds = self._spec.num_requests, self._spec.duration_seconds
        is_in_number = limit is None or self._num_started < limit
        is_in_time = duration_seconds is None or time.perf_counter() - self._started_seconds < duration_seconds
        return is_in_number and is_in_time

    def _next_ask(self) -> Ask:
        ask = self._workload.ask(self._num_started)
        self._num_started += 1
        return ask


async def _warm_up(spec: ClosedLoopSpec, client: ChatClient) -> None:
    """Each adapter's first requests, so that loading it is not measured. A failure shows again in the run itself."""
    names = tuple(dict.fromkeys(spec.adapters))
    workload = Workload(names, spec.prompts, spec.seed)
    slots = asyncio.Semaphore(spec.num_streams)

    async def send(index: int) -> None:
        async with slots:
            await _send(spec, client, workload.ask(index), min(spec.max_tokens, _WARMUP_MAX_TOKENS))

    async with asyncio.TaskGroup() as requests:
        for index in range(spec.num_warmup_requests * len(names)):
            requests.create_task(send(index))


async def _send(spec: ClosedLoopSpec, client: ChatClient, ask: Ask, max_tokens: int) -> RequestResult:
    return await client.chat(
        [{"role": "user", "content": ask.prompt}],
        adapter=ask.adapter,
        model=spec.model,
        max_tokens=max_tokens,
        temperature=spec.temperature,
        seed=ask.seed,
    )


async def _run_until(stop: asyncio.Event, work: Coroutine[Any, Any, None]) -> None:
    """Awaits `work`, cancelling it as soon as `stop` is set."""
    work_task = asyncio.create_task(work)
    stop_task = asyncio.create_task(stop.wait())
    try:
        await asyncio.wait({work_task, stop_task}, return_when=asyncio.FIRST_COMPLETED)
    finally:
        stop_task.cancel()
        work_task.cancel()
        with suppress(asyncio.CancelledError):
            await work_task
