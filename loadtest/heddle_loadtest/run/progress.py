"""A run's progress on standard error. Knows what to show, not how the run works; silent unless on a terminal."""

from __future__ import annotations

import time
from types import TracebackType
from typing import Self

from rich.console import Console
from rich.progress import BarColumn, Progress, TextColumn, TimeElapsedColumn

from heddle_loadtest.client.result import RequestResult
from heddle_loadtest.workload.schedule import Schedule


class RunProgress:
    """A line that fills up while a run goes on. Hand `warm_up`, `start` and `count` to the run as its callbacks."""

    def __init__(self, target: str, num_repeats: int = 1, *, is_hidden: bool = False) -> None:
        console = Console(stderr=True)
        columns = (TextColumn("{task.description}", markup=False), BarColumn(), TimeElapsedColumn())
        is_hidden = is_hidden or not console.is_terminal
        self._progress = Progress(*columns, console=console, transient=True, refresh_per_second=4, disable=is_hidden)
        self._is_hidden = is_hidden
        self._task = self._progress.add_task(f"asking {target} what it has", total=None)
        self._num_repeats = num_repeats
        self._repeat = 0
        self._started_seconds = 0.0
        self._num_requests: int | None = None
        self._seconds: float | None = None
        self._num_ok = 0
        self._num_failed = 0

    def __enter__(self) -> Self:
        self._progress.start()
        return self

    def __exit__(
        self, error_type: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self.stop()

    def stop(self) -> None:
        """Takes the line away and gives the terminal back as it was."""
        self._progress.stop()

    def warm_up(self, repeat: int) -> None:
        """A repeat begins, from 0."""
        self._repeat = repeat
        self._progress.update(self._task, description=f"{self._prefix()}warming up", total=None)

    def start(self, schedule: Schedule) -> None:
        """Measuring begins."""
        self._started_seconds = time.perf_counter()
        self._num_ok = self._num_failed = 0
        self._seconds = schedule.seconds
        self._num_requests = len(schedule.requests)
        description = f"{self._prefix()}{self._num_requests} requests over {len(schedule.adapters)} adapters"
        self._progress.update(self._task, description=description, total=1.0, completed=0.0)

    def count(self, result: RequestResult) -> None:
        """One more request is done."""
        self._num_ok += result.is_ok
        self._num_failed += not result.is_ok
        if self._is_hidden:
            return
        description = f"{self._prefix()}{self._num_ok} ok, {self._num_failed} failed"
        self._progress.update(self._task, description=description, completed=self._fraction_done())

    def _prefix(self) -> str:
        return f"repeat {self._repeat + 1} of {self._num_repeats}: " if self._num_repeats > 1 else ""

    def _fraction_done(self) -> float:
        """By requests or by time, whichever is further."""
        fractions = [0.0]
        if self._num_requests:
            fractions.append((self._num_ok + self._num_failed) / self._num_requests)
        if self._seconds is not None:
            fractions.append((time.perf_counter() - self._started_seconds) / self._seconds)
        return min(max(fractions), 1.0)
