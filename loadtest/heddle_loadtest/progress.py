"""A run's progress on standard error. Knows what to show, not how the run works; silent unless on a terminal."""

import time
from types import TracebackType
from typing import Self

from rich.console import Console
from rich.progress import BarColumn, Progress, TextColumn, TimeElapsedColumn

from heddle_loadtest.result import RequestResult
from heddle_loadtest.spec import ClosedLoopSpec


class RunProgress:
    """A line that fills up while a run goes on. Hand `start` and `count` to the run as its callbacks."""

    def __init__(self, spec: ClosedLoopSpec, *, is_hidden: bool = False) -> None:
        console = Console(stderr=True)
        columns = (TextColumn("{task.description}", markup=False), BarColumn(), TimeElapsedColumn())
        is_hidden = is_hidden or not console.is_terminal
        self._progress = Progress(*columns, console=console, transient=True, refresh_per_second=4, disable=is_hidden)
        self._task = self._progress.add_task(f"warming up {spec.target}", total=None)
        self._spec = spec
        self._started_seconds = 0.0
        self._num_ok = 0
        self._num_failed = 0

    def __enter__(self) -> Self:
        self._progress.start()
        return self

    def __exit__(
        self, error_type: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self._progress.stop()

    def start(self, spec: ClosedLoopSpec) -> None:
        """Measuring begins."""
        self._started_seconds = time.perf_counter()
        description = f"{spec.num_streams} streams over {len(set(spec.adapters))} adapters"
        self._progress.update(self._task, description=description, total=1.0)

    def count(self, result: RequestResult) -> None:
        """One more request is done."""
        self._num_ok += result.is_ok
        self._num_failed += not result.is_ok
        description = f"{self._num_ok} ok, {self._num_failed} failed"
        self._progress.update(self._task, description=description, completed=self._fraction_done())

    def _fraction_done(self) -> float:
        fractions = [0.0]
        if self._spec.num_requests is not None:
            fractions.append((self._num_ok + self._num_failed) / self._spec.num_requests)
        if self._spec.duration_seconds is not None:
            fractions.append((time.perf_counter() - self._started_seconds) / self._spec.duration_seconds)
        return min(max(fractions), 1.0)
