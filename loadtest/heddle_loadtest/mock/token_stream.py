"""One answer's tokens, each at its own time. Knows neither adapters nor what the bytes mean."""

from __future__ import annotations

import asyncio
from collections.abc import Callable

from heddle_loadtest.mock.lateness import Lateness


class TokenStream:
    """Calls `send(index)` for token 0, 1, … at `first_at + index * itl_seconds` on the loop's clock.

    The times are absolute, so that a late token makes no other token late and nothing drifts. One timer and no task
    is all a stream holds: a coroutine that sleeps between tokens costs several times as much.
    """

    def __init__(
        self,
        send: Callable[[int], None],
        num_tokens: int,
        *,
        first_at: float,
        itl_seconds: float,
        lateness: Lateness,
        draw_jitter: Callable[[], float] | None = None,
    ) -> None:
        self._loop = asyncio.get_running_loop()
        self._send = send
        self._num_tokens = num_tokens
        self._num_sent = 0
        self._first_at = first_at
        self._itl_seconds = itl_seconds
        self._lateness = lateness
        self._draw_jitter = draw_jitter
        self._done: asyncio.Future[None] = self._loop.create_future()
        self._due = 0.0
        self._timer = self._plan()

    @property
    def ended_at(self) -> float:
        """When the last token was due; now, if it has not left."""
        return self._due if self._num_sent == self._num_tokens else self._loop.time()

    async def finish(self) -> None:
        """Waits until the last token has left; being cancelled ends the stream."""
        try:
            await self._done
        finally:
            self._timer.cancel()

    def _plan(self) -> asyncio.TimerHandle:
        self._due = self._first_at + self._num_sent * self._itl_seconds
        if self._draw_jitter is not None:
            self._due += self._draw_jitter()
        return self._loop.call_at(self._due, self._send_next)

    def _send_next(self) -> None:
        self._lateness.add(self._loop.time() - self._due)
        self._send(self._num_sent)
        self._num_sent += 1
        if self._num_sent < self._num_tokens:
            self._timer = self._plan()
        elif not self._done.done():
            self._done.set_result(None)
