"""One admitted request of the fake server, from its arrival to its end: waits, streams, counts.

A request first waits for its adapter, holding nothing, then for a place, then TTFT and ITL pass.
"""

from __future__ import annotations

import asyncio
import random
from dataclasses import dataclass

from aiohttp import web

from heddle_loadtest.mock.adapter_slots import AdapterSlots
from heddle_loadtest.mock.counts import Counts
from heddle_loadtest.mock.lateness import Lateness
from heddle_loadtest.mock.places import Places
from heddle_loadtest.mock.settings import MockSettings
from heddle_loadtest.mock.token_stream import TokenStream
from heddle_loadtest.mock.wire import Answer, Body

_EVENT_STREAM = {"Content-Type": "text/event-stream; charset=utf-8", "Cache-Control": "no-cache"}


@dataclass(frozen=True)
class Machine:
    """What all requests share."""

    settings: MockSettings
    slots: AdapterSlots
    places: Places
    counts: Counts
    lateness: Lateness
    jitter: random.Random

    def draw_jitter(self) -> float:
        """How much later than otherwise a token leaves."""
        return self.jitter.uniform(0.0, self.settings.jitter_seconds)


class Generation:
    """One request; its times are on the loop's clock."""

    def __init__(
        self, machine: Machine, answer: Answer, body: Body, adapter: str | None, arrived_at: float, *, is_broken: bool
    ) -> None:
        self._machine = machine
        self._answer = answer
        self._body = body
        self._adapter = adapter
        self._arrived_at = arrived_at
        self._is_broken = is_broken
        self._loop = asyncio.get_running_loop()
        self._transport: asyncio.Transport | None = None  # of a stream
        self._cache: str | None = None
        self._ready_at = arrived_at
        self._started_at = arrived_at
        self._first_token_at = arrived_at
        self._num_sent = 0

    async def serve(self, request: web.Request) -> web.StreamResponse:
        """Answers `request`. Being cancelled, because the client is gone, gives back what the request holds."""
        response = await self._open(request) if self._body.stream else None
        outcome = "disconnect"
        try:
            await self._load_adapter()
            await self._compute()
            outcome = "error" if self._is_broken else "length"
        finally:
            self._count(outcome)
        return await self._close(request, response)

    async def _open(self, request: web.Request) -> web.StreamResponse:
        response = web.StreamResponse(headers=_EVENT_STREAM)
        response.enable_chunked_encoding()
        await response.prepare(request)
        if opening := self._answer.opening():
            await response.write(opening)
        self._transport = request.transport
        return response

    async def _close(self, request: web.Request, response: web.StreamResponse | None) -> web.StreamResponse:
        if self._is_broken and request.transport is not None:
            request.transport.close()
        elif response is not None:
            await response.write(self._answer.closing())
        return response or web.Response(body=self._answer.whole(self._report()), content_type="application/json")

    async def _load_adapter(self) -> None:
        if self._adapter is None:
            return
        self._cache, self._ready_at = self._machine.slots.use(self._adapter, self._arrived_at)
        self._machine.counts.cache_requests.labels(self._cache).inc()
        if self._ready_at > self._arrived_at:
            await asyncio.sleep(self._ready_at - self._loop.time())

    async def _compute(self) -> None:
        """Waits for a place and keeps it until the last token."""
        machine, num_tokens = self._machine, self._body.num_tokens
        self._started_at = await machine.places.take(self._ready_at)
        tokens = TokenStream(
            self._send_token,
            max(1, num_tokens // 2) if self._is_broken else num_tokens,
            first_at=self._started_at + machine.settings.ttft_seconds,
            itl_seconds=machine.settings.itl_seconds,
            lateness=machine.lateness,
            draw_jitter=machine.draw_jitter if machine.settings.jitter_seconds else None,
        )
        try:
            await tokens.finish()
        finally:
            machine.places.leave(tokens.ended_at)

    def _send_token(self, index: int) -> None:
        """Writes to the connection itself: `response.write` is a coroutine and would want a task per stream."""
        if index == 0:
            self._first_token_at = self._loop.time()
        self._num_sent += 1
        if self._transport is not None:
            is_last = self._num_sent == self._body.num_tokens
            event = self._answer.last_token(self._report()) if is_last else self._answer.token(index)
            self._transport.write(b"%x\r\n%b\r\n" % (len(event), event))

    def _report(self) -> dict[str, object]:
        """The reply's `heddle` object; what the mock has no value for is left out."""
        return {
            "adapter": self._adapter,
            "cache": self._cache,
            "load_ms": self._milliseconds(self._ready_at),
            "queue_ms": self._milliseconds(self._started_at),
            "ttft_ms": self._milliseconds(self._first_token_at),
        }

    def _milliseconds(self, at: float) -> float:
        return round((at - self._arrived_at) * 1000, 2)

    def _count(self, outcome: str) -> None:
        counts = self._machine.counts
        counts.requests.labels(outcome).inc()
        counts.prompt_tokens.inc(self._body.num_prompt_tokens)
        counts.generated_tokens.inc(self._num_sent)
        counts.request_seconds.observe(self._loop.time() - self._arrived_at)
        if self._num_sent:
            counts.time_to_first_token.observe(self._first_token_at - self._arrived_at)
