"""Whether the client itself keeps up: its CPU, its event loop, its garbage collector. Knows no requests."""

from __future__ import annotations

import asyncio
import gc
import time
from array import array
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from types import TracebackType
from typing import Self

from heddle_loadtest.run.outcome import ClientHealth

_SAMPLE_SECONDS = 0.020
_NEVER = 1 << 30


class HealthMeter:
    """Samples while its `with` block runs, which must be inside a running event loop; `health` is what it found."""

    def __init__(self) -> None:
        self._lag_seconds = array("d")
        self._started_seconds = 0.0
        self._started_cpu_seconds = 0.0
        self._cpu_share = 0.0
        self._sampler: asyncio.Task[None] | None = None

    def __enter__(self) -> Self:
        self._started_seconds, self._started_cpu_seconds = time.perf_counter(), time.process_time()
        self._sampler = asyncio.create_task(self._sample())
        return self

    def __exit__(
        self, error_type: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        if self._sampler is not None:
            self._sampler.cancel()
        elapsed_seconds = time.perf_counter() - self._started_seconds
        self._cpu_share = (time.process_time() - self._started_cpu_seconds) / max(elapsed_seconds, 1e-9)

    @property
    def health(self) -> ClientHealth:
        """After the block."""
        return ClientHealth(cpu_share=self._cpu_share, loop_lag_seconds=tuple(self._lag_seconds))

    async def _sample(self) -> None:
        while True:
            due_seconds = time.perf_counter() + _SAMPLE_SECONDS
            await asyncio.sleep(_SAMPLE_SECONDS)
            self._lag_seconds.append(time.perf_counter() - due_seconds)


@contextmanager
def calm_collector() -> Iterator[None]:
    """Keeps full garbage collections out of the block.

    A full collection looks at every object there is: with a schedule of 100,000 requests that stalls the event loop
    for tens of milliseconds, which would show as latency of the target. What is there already is set aside; young
    objects are collected as always, in well under a millisecond.
    """
    thresholds = gc.get_threshold()
    gc.collect()
    gc.freeze()
    gc.set_threshold(thresholds[0], thresholds[1], _NEVER)
    try:
        yield
    finally:
        gc.set_threshold(*thresholds)
        gc.unfreeze()


def raise_file_limit() -> None:
    """Each request under way takes a file descriptor, and many systems allow 1,024 of them unless asked for more."""
    try:
        import resource
    except ImportError:  # not a Unix
        return
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    if soft != hard:
        with suppress(OSError, ValueError):  # some systems say more than they give
            resource.setrlimit(resource.RLIMIT_NOFILE, (hard, hard))
