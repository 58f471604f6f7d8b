"""Starts the requests of open loops when they are due. Waits for no answer and sends nothing itself."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Callable, Sequence

from heddle_loadtest.workload.schedule import ScheduledRequest


class Dispatcher:
    """Calls `start` with each request and the time it was due, on the clock of `time.perf_counter`.

    A timer's callback does it. A coroutine that slept until then would go on only in the next turn of the event loop,
    behind all tokens that arrive meanwhile: a lag of 5.5 ms instead of 4.2 (p99, a thousand streams on two cores that
    others used too, November 2026).
    """

    def __init__(
        self,
        requests: Sequence[ScheduledRequest],
        started_seconds: float,
        start: Callable[[ScheduledRequest, float], None],
    ) -> None:
        """`requests` in the order of their times, which count from `started_seconds`; those without are left out."""
        self._due = [(started_seconds + one.at_seconds, one) for one in requests if one.at_seconds is not None]
        self._start = start
        self._num_started = 0
        self._timer: asyncio.TimerHandle | None = None

    async def run(self) -> None:
        """Until the last one is started; cancelled, it starts no more."""
        over = asyncio.get_running_loop().create_future()
        self._start_due(over)
        try:
            await over
        finally:
            if self._timer is not None:
                self._timer.cancel()

    def _start_due(self, over: asyncio.Future[None]) -> None:
        if over.done():  # cancelled, and its task did not get to stop the timer yet
            return
        while self._num_started < len(self._due):
            due_seconds, request = self._due[self._num_started]
            delay_seconds = due_seconds - time.perf_counter()
            if delay_seconds > 0:
                self._timer = over.get_loop().call_later(delay_seconds, self._start_due, over)
                return
            self._num_started += 1
            self._start(request, due_seconds)
        over.set_result(None)
