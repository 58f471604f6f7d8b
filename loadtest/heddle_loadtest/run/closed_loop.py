"""The requests of one tenant's closed loop, one after another: what its streams take next. Sends nothing."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence

import msgspec

from heddle_loadtest.workload.schedule import ScheduledRequest


class ClosedLoop:
    """The list from its start to its end, and then from its start again, under new ids, if there is a `next_id`."""

    def __init__(
        self, requests: Sequence[ScheduledRequest], ends_seconds: float | None, next_id: Callable[[], int] | None
    ) -> None:
        """Nothing is due after `ends_seconds` on the clock of `time.perf_counter`; None: when the list is through."""
        self._requests = requests
        self._ends_seconds = ends_seconds
        self._next_id = None if ends_seconds is None else next_id
        self._num_taken = 0

    @property
    def num_requests(self) -> int:
        """Of the list: more streams than that find nothing to ask."""
        return len(self._requests)

    def take(self) -> ScheduledRequest | None:
        """The next request, to be sent now; None if the loop is over."""
        if not self._requests or (self._ends_seconds is not None and time.perf_counter() >= self._ends_seconds):
            return None
        num_rounds, index = divmod(self._num_taken, len(self._requests))
        self._num_taken += 1
        if num_rounds == 0:
            return self._requests[index]
        return None if self._next_id is None else msgspec.structs.replace(self._requests[index], id=self._next_id())
