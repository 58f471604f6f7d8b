"""Places for the requests that the fake server computes at once, first come, first served."""

from __future__ import annotations

import asyncio
from collections import deque


class Places:
    """`capacity` of them, or any number if None. A place passes on at the time it was left, however late that is seen.

    So a full server starts its requests on schedule, and what it can sustain is exactly its capacity over the time
    of a request.
    """

    def __init__(self, capacity: int | None) -> None:
        self._num_free = capacity
        self._waiting: deque[asyncio.Future[float]] = deque()
        self.num_taken = 0
        self.max_taken = 0

    async def take(self, ready_at: float) -> float:
        """Waits for a place; the time from which on it is ours, on the loop's clock, `ready_at` at the earliest."""
        if self._num_free != 0:
            if self._num_free is not None:
                self._num_free -= 1
            self._count()
            return ready_at
        place: asyncio.Future[float] = asyncio.get_running_loop().create_future()
        self._waiting.append(place)
        try:
            return max(ready_at, await place)
        except asyncio.CancelledError:
            if place.done() and not place.cancelled():
                self.leave(place.result())
            raise

    def leave(self, left_at: float) -> None:
        """Hands the place to whoever waits longest."""
        self.num_taken -= 1
        while self._waiting:
            place = self._waiting.popleft()
            if not place.done():
                place.set_result(left_at)
                self._count()
                return
        if self._num_free is not None:
            self._num_free += 1

    def _count(self) -> None:
        self.num_taken += 1
        self.max_taken = max(self.max_taken, self.num_taken)
