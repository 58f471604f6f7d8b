"""A run as it lies in its result folder, whole. Knows no file names and computes nothing."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from heddle_loadtest.run.outcome import Outcome
from heddle_loadtest.workload.spec import Workload


@dataclass(frozen=True, slots=True, kw_only=True)
class StoredRun:
    """What `read_run` finds."""

    name: str  # of the folder
    workload: Workload  # as run
    environment: dict[str, Any]  # environment.json
    outcomes: tuple[Outcome, ...]  # one a repeat, each on a clock that starts at 0
    summary: dict[str, Any]  # summary.json
