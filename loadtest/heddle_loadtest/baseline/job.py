"""A request on its way through the queue, and the stream its answer travels back on, from thread to event loop."""

from __future__ import annotations

import asyncio
import time
from collections.abc import AsyncIterator, Iterable
from dataclasses import dataclass, field
from typing import Protocol

from heddle_loadtest.baseline.request import GenerationRequest, Step


class BaselineError(Exception):
    """Why the model could not answer; shown to the client."""


class StepStream:
    """One answer's steps. Created and read on the event loop; filled from any thread, by `deliver` and `fail`."""

    def __init__(self) -> None:
        self.is_abandoned = False  # its reader has gone; set by the event loop, read by the model's thread
        self._loop = asyncio.get_running_loop()
        self._events: asyncio.Queue[Step | BaselineError] = asyncio.Queue()

    async def __aiter__(self) -> AsyncIterator[Step]:
        """Until the last step. Raises BaselineError if the model failed."""
        while True:
            event = await self._events.get()
            if isinstance(event, BaselineError):
                raise event
            yield event
            if event.finish_reason is not None:
                return

    def fail(self, message: str) -> None:
        """Ends the stream; after its last step this does nothing any more."""
        _call_on(self._loop, [(self, BaselineError(message))])

    @staticmethod
    def deliver(steps: Iterable[tuple[StepStream, Step]]) -> None:
        """The steps of one batch, all of one event loop: it is woken once."""
        events = list(steps)
        if events:
            _call_on(events[0][0]._loop, events)


@dataclass(frozen=True, eq=False)
class Job:
    """A request that waits or is being answered."""

    request: GenerationRequest
    stream: StepStream
    submitted_seconds: float = field(default_factory=time.monotonic)


class Batcher(Protocol):
    """Whoever decides which requests the model computes together."""

    def submit(self, job: Job) -> None:
        """Queue it; its stream gets the answer. Called on the event loop, does not wait for the model."""

    def close(self) -> None:
        """Fail what is not answered and wait for the model's thread to end, which takes a step at most."""


def _call_on(
    loop: asyncio.AbstractEventLoop, events: list[tuple[StepStream, Step]] | list[tuple[StepStream, BaselineError]]
) -> None:
    def put_all() -> None:
        for stream, event in events:
            stream._events.put_nowait(event)

    loop.call_soon_threadsafe(put_all)
