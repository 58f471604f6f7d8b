"""For how much of a time this thread could have run but had no core: other work's doing, not its own.

Linux counts it in nanoseconds as the second number of /proc/PID/task/TID/schedstat (its
Documentation/scheduler/sched-stats.rst); other systems do not.
"""

from __future__ import annotations

import threading
import time
from pathlib import Path
from types import TracebackType
from typing import Self


class CoreWait:
    """Measures while its `with` block runs; `share` is of the block's time, None where nobody counts."""

    def __init__(self) -> None:
        self.share: float | None = None
        self._started_seconds = 0.0
        self._waited_before: float | None = None

    def __enter__(self) -> Self:
        self._started_seconds, self._waited_before = time.perf_counter(), _waited_seconds()
        return self

    def __exit__(
        self, error_type: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        waited_seconds = _waited_seconds()
        if waited_seconds is not None and self._waited_before is not None:
            elapsed_seconds = time.perf_counter() - self._started_seconds
            self.share = (waited_seconds - self._waited_before) / max(elapsed_seconds, 1e-9)


def _waited_seconds() -> float | None:
    try:
        counts = Path(f"/proc/self/task/{threading.get_native_id()}/schedstat").read_text()
        return int(counts.split()[1]) / 1e9
    except (OSError, ValueError, IndexError):
        return None
